"""The self-supervised branch: what the image tower learns from pictures alone, beside the language loss.

Paper: section 3.2 (SimCLR). Every partner has the same three methods, called by whoever trains:

    branch.look(tower, chunk) -> {name: features [b, D]}   in SLIP.forward: has the tower, sees a chunk
    branch(features)          -> loss, accuracy            after the gather: sees the whole global batch
    branch.after_step(tower, progress)                     after the optimizer's step (momentum encoders)

So BatchNorm's statistics are the global batch's, for any number of chunks and ranks, without a SyncBatchNorm.
Not here: the losses (losses.py), drawing the views (augment.py).
"""

from torch import nn

from losses import nt_xent


def mlp(width, hidden, out):
    """Three linear layers with bias, BatchNorm and ReLU after the first two, nothing after the last."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, out),
    )


class SimCLR(nn.Module):
    """Two strong views of a picture find each other. The head takes the class token's feature, not the CLIP
    embedding.
    """

    views = "simclr"

    def __init__(self, width, hidden=4096, out=256, temperature=0.1):
        super().__init__()
        self.temperature = temperature
        self.head = mlp(width, hidden, out)

    def look(self, tower, chunk):
        """Views [b, 3, H, W] -> features [b, D], each."""
        return {"features1": tower(chunk["view1"]), "features2": tower(chunk["view2"])}

    def forward(self, features):
        """Features [B, D] of both views -> (loss, accuracy). The head is called once a view: its statistics
        are a view's.
        """
        z1, z2 = self.head(features["features1"]), self.head(features["features2"])
        return nt_xent(z1, z2, self.temperature)

    def after_step(self, tower, progress):
        """Nothing moves but by gradient."""


BRANCHES = {"simclr": SimCLR}
