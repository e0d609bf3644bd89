"""Text <-> tokens of a sentencepiece model file, such as the tokenizer.model of Llama 2 or Mistral."""

from data_pipeline.tokenize.pretrained_text import Codec, pretrained_kind

FILES = ("tokenizer.model", "sentencepiece.model", "spiece.model", "sentencepiece.bpe.model")


def read_file(content: bytes) -> Codec:
    """The codec of a sentencepiece model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = processor.get_piece_size()
    special = {
        processor.id_to_piece(number): number for number in range(size) if processor.is_control(number)
    }
    return Codec(
        encode=processor.encode,
        decode=processor.decode,
        num_ids=size,
        special_id=special.get,
        library=f"sentencepiece {sentencepiece.__version__}",
    )


TOKENIZER = pretrained_kind("sentencepiece", FILES, read_file, needs="sentencepiece")
