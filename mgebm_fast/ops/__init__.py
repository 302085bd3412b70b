"""The ops: checks, schemas and the choice of backend. `backend.TABLE` says in which layers each op is written."""

from .backend import BACKENDS, TABLE, choose, unavailable
from .batch_norm_act import batch_norm_act, batch_norm_act_backward
from .bias_act import bias_act, bias_act_backward
from .conv_chain import conv_chain
from .conv_learn import conv_learn
from .dense_chain import dense_chain_
from .dense_net import DenseNet, DenseNorm, dense_net, dense_net_of
from .edge_step import NO_BAD_STEP, EdgeWeights, edge_step_, edge_weights
from .graph_chain import graph_chain
from .langevin_step import langevin_step_
from .noise import noise
from .pyramid import pyramid
from .update import coefficients
from .upsample import upsample

__all__ = [
    "BACKENDS",
    "NO_BAD_STEP",
    "TABLE",
    "DenseNet",
    "DenseNorm",
    "EdgeWeights",
    "batch_norm_act",
    "batch_norm_act_backward",
    "bias_act",
    "bias_act_backward",
    "choose",
    "coefficients",
    "conv_chain",
    "conv_learn",
    "graph_chain",
    "dense_chain_",
    "dense_net",
    "dense_net_of",
    "edge_step_",
    "edge_weights",
    "langevin_step_",
    "noise",
    "pyramid",
    "unavailable",
    "upsample",
]
