from .stages import Squeezed as Squeezed
from .stages import StageReport as StageReport
from .stages import StageRow as StageRow
from .stages import squeeze_in_stages as squeeze_in_stages
