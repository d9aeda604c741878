"Images: sets of them, their probabilities, a UNet, the distances of samples, and runs on images."
from lfdm.images import templates  # noqa: F401  it joins IMAGES
