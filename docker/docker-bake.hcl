# docker buildx bake -f docker/docker-bake.hcl --set '*.secrets=id=ca,src=/path/to/ca.crt'
# The same as docker/images.sh, for CI systems that build with bake; there, labels come from the variables.

variable "BASE_IMAGE" {
  default = "python:3.13.9-slim-bookworm"
}
variable "REGISTRY" {
  default = ""
}
variable "TAG" {
  default = "0.1.0"
}
variable "REVISION" {
  default = "unknown"
}
variable "CODE_DIGEST" {
  default = "unknown"
}
variable "INDEX" {
  default = ""
}
variable "TORCH_INDEX" {
  default = ""
}
variable "CPU" {
  default = "0"
}

function "named" {
  params = [image]
  result = REGISTRY == "" ? "vitpipe-${image}:${TAG}" : "${REGISTRY}/vitpipe-${image}:${TAG}"
}

group "default" {
  targets = ["train", "dense", "mlflow"]
}

target "common" {
  context    = "."
  dockerfile = "docker/Dockerfile"
  args = {
    BASE_IMAGE  = BASE_IMAGE
    INDEX       = INDEX
    TORCH_INDEX = TORCH_INDEX
    CPU         = CPU
    VERSION     = TAG
    REVISION    = REVISION
    CODE_DIGEST = CODE_DIGEST
  }
}

target "train" {
  inherits = ["common"]
  target   = "stages"
  args = {
    KIND = "train"
  }
  tags     = [named("train")]
}

target "dense" {
  inherits = ["common"]
  target   = "stages"
  args = {
    KIND = "dense"
  }
  tags     = [named("dense")]
}

target "mlflow" {
  inherits = ["common"]
  target   = "mlflow"
  tags     = [named("mlflow")]
}
