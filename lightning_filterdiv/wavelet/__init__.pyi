from .functional import dilated_details as dilated_details
from .functional import local_maxima as local_maxima
from .functional import reconstruct as reconstruct
from .modules import WaveletModulusMaxima as WaveletModulusMaxima
from .modules import WaveletReconstruction as WaveletReconstruction
