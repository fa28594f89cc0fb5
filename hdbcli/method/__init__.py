"""The method of HyperDreamBooth, one idea a file.

`basis` is the frozen random basis, `lidb` the layer with few trained numbers, `inject` puts layers
into a model, `hypernet` predicts their numbers from a face, `relax` adds ranks, and `algebra` has
spectra, lower ranks and weighted sums. Imports torch and `registry.errors` alone.
"""
