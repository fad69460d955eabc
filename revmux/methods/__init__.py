"""The methods, one file per method. Each file contains the multiplexer and its demultiplexer."""

from revmux.methods import datamux as datamux
from revmux.methods import exit_head as exit_head
from revmux.methods import mux_plm as mux_plm
from revmux.methods import only_multiplexer_reversible as only_multiplexer_reversible
from revmux.methods import revmux as revmux
from revmux.methods import siso as siso
from revmux.methods import skip_only as skip_only
from revmux.methods import token_split as token_split
from revmux.methods import vanilla_adapter as vanilla_adapter
from revmux.methods.base import BackboneShape, Method
from revmux.methods.exit_head import ExitHead
from revmux.methods.registry import build_method, method_class, method_names, register_method
from revmux.methods.siso import Siso

__all__ = [
    "BackboneShape",
    "ExitHead",
    "Method",
    "Siso",
    "build_method",
    "method_class",
    "method_names",
    "register_method",
]
