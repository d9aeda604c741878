__version__ = "0.1.0"

from . import adaptive, densities, discrete  # they join SCHEDULES
