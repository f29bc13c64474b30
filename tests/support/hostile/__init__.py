"""What a user's disk, keyboard and colleagues may hand to hessdiag, made from fixed seeds.

The generators know no assertion; :mod:`hostile.harness` runs the command line on what they make
and :mod:`hostile.judge` holds its answer against the contract.
"""
