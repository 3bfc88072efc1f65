"""Mean and standard deviation per channel of ImageNet's training images, values in [0, 1]."""

# Not beside the types of recipes, which enter a stage's identity by their values: the dense heads read these
# numbers directly, and a recipe has no key for them.

# All five papers normalise with these, as timm and torchvision state them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
