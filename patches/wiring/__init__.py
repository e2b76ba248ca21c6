"""Makes the patch series for SGLang's source tree: ``make patches``.

What a patch adds as files is the plugin's own source (:mod:`.places`); what it changes in SGLang's files is a few
edits, one module of this package per feature.
"""
