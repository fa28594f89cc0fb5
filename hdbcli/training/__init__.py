"""Everything that trains: the refinement of one person, and the hypernetwork.

`loop` is the one training loop; `refine`, `likeness_loss`, `preservation` and `objective` are
losses, `questions` is how they ask the base; `personalise` goes from photo to identity; `people`
and `shards` read photos; the rest trains the hypernetwork and measures it.
May import identity and measure beside it, and model, method, faces and registry below.
"""
