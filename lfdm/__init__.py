__version__ = "0.1.0"

from . import adaptive, discrete  # they join SCHEDULES
