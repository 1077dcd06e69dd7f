"""Which convolution the Triton backend of `conv_bn` takes: ours, or the library's (cuDNN's) between passes of ours.

Ours saves the passes over memory that normalise its input (one read, one write) and measure its output (one read).
What they take of the convolution's own time falls with C, the channels in and out, both at the peaks of an H200 (989
TFLOP/s in bfloat16, 67 in float32 without TF32, 4.8 TB/s):

    3 * bytes * C / 4.8e12 / (2 * k^2 * C^2 / peak) = 69 / C for 3x3 and 618 / C for 1x1 in bfloat16, 9.3 / C and 84 / C
    in float32

From the channels of `LIBRARY_FROM` on it is below a third: the convolution is bound by arithmetic, at which cuDNN is
expected to be the faster by more than that. This is arithmetic, NOT MEASURED. On a GPU this prints the table to put in:

    pytest benchmarks/bench_conv_bn.py -k ours_against

`conv_scale` is ours unless the library's is asked for by name: behind that one, scaling and adding are torch's passes.
7x7 stems are the library's always. BMSN_CONVOLUTION=ours or =library overrides the table.
"""

from __future__ import annotations

from torch import Tensor

from bmsn.backend import convolution_choice

# (kernel size, bytes of an element) -> from how many channels on, in and out, the library convolves. Not measured.
LIBRARY_FROM = {(3, 2): 256, (1, 2): 2048, (3, 4): 32, (1, 4): 256}


def takes_library(weight: Tensor) -> bool:
    """Whether the library convolves with `weight` (..., O, I, k, k). Raises InputError as `convolution_choice`."""
    asked = convolution_choice()
    outputs, inputs, kernel, _ = weight.shape[-4:]
    wide = min(outputs, inputs) >= LIBRARY_FROM[kernel, weight.element_size()]
    return asked == "library" or (asked == "auto" and wide)
