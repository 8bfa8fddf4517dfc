"""Single weights as parameters: which are chosen (GaLLoP, GEM, SAFT), the layer that trains them, their files."""

from agsel.elements.choosing import METHODS, choose_elements, require_density, require_method
from agsel.elements.files import base_of, export_elements, load_elements
from agsel.elements.layer import ElementLinear, element_layers, mask_of, use_elements
from agsel.elements.mask import ElementMask

__all__ = [
    "METHODS",
    "ElementLinear",
    "ElementMask",
    "base_of",
    "choose_elements",
    "element_layers",
    "export_elements",
    "load_elements",
    "mask_of",
    "require_density",
    "require_method",
    "use_elements",
]
