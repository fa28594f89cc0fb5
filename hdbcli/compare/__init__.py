"""`hdb compare`: HyperDreamBooth, its ablations and other methods on the same people.

`methods` lists what is compared, `baselines` are LoRA, DreamBooth and Textual Inversion, `run` lets
each learn and keeps what it drew, `timing` takes seconds, `results` judges, `page` lays it out.
May import training, identity, interop, measure and everything below them.
"""
