"""What people post to a served model: pictures in every form, and what is none."""

import base64
import json

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from model_files import offered, picture, write_model

from vitpipe.contracts.errors import InputError
from vitpipe.track.model_folder import open_predictor
from vitpipe.track.model_registry import write_package
from vitpipe.track.posted_pictures import pictures


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The model as MLflow stores it, and the folder of its files."""
    place = tmp_path_factory.mktemp("package")
    folder = write_model(place / "model")
    write_package(place / "package", offered(), folder, "0" * 32, "m-" + "0" * 32)
    return place / "package", folder


@pytest.fixture(scope="module")
def served(package):
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(package[0]))


def post(served, request):
    """The answer of MLflow's server to a request in JSON; raises what it answers with a status."""
    from mlflow.pyfunc.scoring_server import invocations

    text = json.dumps(request).encode()
    answer = invocations(text, "application/json", served, served.metadata.get_input_schema())
    return json.loads(answer.response)["predictions"]


IMAGE = picture(3, "PNG")
TEXT = base64.b64encode(IMAGE).decode()
FORMS = {
    "base64": TEXT,
    "base64 in lines": base64.encodebytes(IMAGE).decode(),
    "data URL": f"data:image/png;base64,{TEXT}",
    "data URL without a type": f"data:;base64,{TEXT}",
    "data URL in capitals": f"DATA:image/png;charset=binary;BASE64,{TEXT}",
    "data URL with escapes": "data:image/png;base64," + TEXT.replace("+", "%2B").replace("/", "%2F"),
    "data URL without base64": "data:image/png," + "".join(f"%{byte:02x}" for byte in IMAGE),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_any_form_is_answered_with_its_class(form, served, package):
    (expected,) = open_predictor(package[1])([IMAGE])
    for request in (
        {"dataframe_records": [{"image": FORMS[form]}]},
        {"dataframe_split": {"columns": ["image"], "data": [[FORMS[form]]]}},
        {"instances": [{"image": FORMS[form]}]},
        {"inputs": {"image": [FORMS[form]]}},
    ):
        (row,) = post(served, request)
        assert row["top_classes"] == expected["top_classes"]
        assert row["probability"] == pytest.approx(expected["probability"], rel=1e-5)


def test_bytes_from_python_are_answered_as_before(served, package):
    expected = open_predictor(package[1])([IMAGE, picture(4)])
    found = served.predict(pd.DataFrame({"image": [IMAGE, picture(4)]}))
    assert found["class"].tolist() == [row["class"] for row in expected]


def test_the_stored_example_is_a_request(served, package):
    example = json.loads((package[0] / "serving_input_example.json").read_text())
    (expected,) = open_predictor(package[1])([picture(0)])
    assert post(served, example)[0]["class"] == expected["class"]


WRONG = {
    "null": (None, "an image file in base64 is expected, found null"),
    "a number": (7, "an image file in base64 is expected, found the number 7"),
    "a fraction": (0.5, "found the number 0.5"),
    "a truth value": (True, "found the truth value True"),
    "a list": ([[1], 2], "found a list"),
    "an object": ({"b64": "x"}, "found an object"),
    "an empty text": ("", "found an empty text"),
    "a file's name": ("picture.jpg", "the text 'picture.jpg' is not base64"),
    "an address": ("https://example.org/a.png", "the text 'https://example.org/a.png' is not base64"),
    "cut base64": (TEXT[:-3], r"'iVBORw0KG[^ ]{71}\.\.\.' is not base64: .* or its end is missing"),
    "bad base64 in a data URL": ("data:image/png;base64,%%%", "is not base64"),
    "letters beyond ASCII": ("päckchen", "the text 'päckchen' is not base64"),
    "a data URL without data": ("data:image/png;base64", "has no comma before its data"),
    "other bytes": (base64.b64encode(b"x").decode(), "the bytes are no image that can be read"),
    "half a picture": (base64.b64encode(IMAGE[:900]).decode(), "the bytes are no image that can be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_picture_is_answered_with_400_the_row_and_what_was_found(kind, served):
    value, said = WRONG[kind]
    for records, row in (([{"image": value}], 1), ([{"image": TEXT}, {"image": value}], 2)):
        with pytest.raises(MlflowException, match=rf"Row {row}: .*{said}") as refused:
            post(served, {"dataframe_records": records})
        assert refused.value.get_http_status_code() == 400
        assert "Fix: post a JPEG, PNG or WebP file in base64, or as a data URL" in refused.value.message
        assert "Error(" not in refused.value.message
        assert len(refused.value.message) < 700


def test_all_wrong_rows_of_a_batch_are_named():
    with pytest.raises(InputError, match=r"Row 1: .*null; Row 3: .*the number 4\..*column 'image' of 3 rows"):
        pictures([None, TEXT, np.int64(4)])
    with pytest.raises(InputError, match=r"and 95 more\. Where"):
        pictures([float("nan")] * 100)


def test_a_request_without_rows_says_so(served):
    with pytest.raises(MlflowException, match="The request has no rows") as refused:
        post(served, {"dataframe_split": {"columns": ["image"], "data": []}})
    assert refused.value.get_http_status_code() == 400
