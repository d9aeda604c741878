from . import templates  # it joins IMAGES
