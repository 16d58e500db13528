"""From the files of a corpus to shards: corpora, formats, transforms, tokenizer, preparation."""
