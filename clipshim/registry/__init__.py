"""Images in registries and archives: names, credentials, ranged reads, artifacts and stubs.

Where the bytes of an image come from, and where indexes and stubs go to. Nothing here knows what
an index looks like inside, decodes a layer, or trusts an answer before its digest was checked.
"""
