"""Import of own DFT results: any file that ASE reads, checked, with tags and fixed atoms, to an LMDB.

`importer.import_files` is the whole import, `opening.open_dataset` reads small sets into memory, and
`writing.write_lmdb` takes ASE structures.
"""
