"""The method of HyperDreamBooth, one idea a file.

`basis` is the frozen random basis, `lidb` the layer with few trained numbers, `inject` puts layers
into a model, `hypernet` predicts their numbers from a face, and `algebra` adds ranks (rank
relaxation), takes some away and sums identities. Imports torch and `registry.errors` alone.
"""
