"""Does reweighting help? The paper's questions on real data, many settings of one run: ``python -m benchmarks.study``.

The classifier is mostly an MLP on fixed features (:mod:`benchmarks.features`), cheap enough for several seeds on two
CPU cores, small or large enough to under-fit or fit its training rows.
"""
