"""Identities: one person in one small file.

`file` reads and writes it, within a base's budget of bytes; `derivation` relaxes, shrinks and
composes; `inspection` shows what is inside; `verification` checks what comes in and what is stored;
`interpolation` draws the way from one person to another.
May import model, method, faces and registry.
"""
