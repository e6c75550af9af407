"""The nearest orthogonal matrix, nearly: Newton and Schulz's iteration on many matrices at once."""

import torch
from torch import Tensor

# Of a quintic whose slope at 0 is steepest: singular values end between 0.7 and 1.2, not at 1.
# Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_EPS = 1e-7


def orthogonalized(x: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1, and keep their singular vectors.

        X = x / |x|_F;  five times  A = X X^T,  X = a X + (b A + c A^2) X

    Args:
        x: [..., M, N], bf16, fp32 or fp64; products are in that dtype, norms in fp32 at least.

    Returns:
        [..., M, N] in x's dtype.

    Source: as above; Higham, "Functions of Matrices", 2008, chapter 8 (the iteration).
    """
    tall = x.shape[-2] > x.shape[-1]
    X = (x.mT if tall else x).flatten(0, -3) if x.dim() > 2 else (x.mT if tall else x)[None]
    norms = torch.linalg.vector_norm(
        X, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(X.dtype, torch.float32)
    )
    X = X / norms.clamp(min=_EPS).to(X.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = X @ X.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.baddbmm(X, update, X, beta=a)
    X = X.mT if tall else X
    return X.reshape(x.shape)
