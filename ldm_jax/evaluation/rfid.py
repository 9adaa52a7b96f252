"""The metric rfid: the Fréchet distance (fid.py) between an autoencoder's reconstructions and the reference."""

from ldm_jax.evaluation import fid
from ldm_jax.evaluation.metrics import ORIGINALS, RECONSTRUCTIONS

METRIC = fid.METRIC._replace(
    names=("rfid",),
    of=RECONSTRUCTIONS,
    help="fid of reconstructions; rfd_... with other features than Inception's",
    figures=lambda case, network: fid.figures(case, network, "r"),
    gives=lambda network: fid.gives(network, "r"),
    needs=(ORIGINALS,),
)
