"""EsViT: views and regions matched across views."""
