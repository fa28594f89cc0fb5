"""Everything that trains: the refinement of one person, and the hypernetwork.

`loop` is the one training loop; `refine`, `likeness_loss`, `preservation` and `objective` are
losses and their parts, `questions` how they ask the base, `drafting` how they let it draw;
`personalise` goes from a photo to an identity; `people` reads photos,
`shards` prepares them and reads what was prepared; `hypernetwork`, `bank`, `batch`, `evaluate` and
`monitor` train the hypernetwork and measure it.
May import identity and measure beside it, and model, method, faces and registry below.
"""
