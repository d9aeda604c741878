__version__ = "0.1.0"

from . import adaptive, densities, discrete, uncertainty  # they join SCHEDULES and WEIGHTINGS
