//! Small tokenizers of every kind that matters, made here.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::Arc;

use kvrun_text::Tokenizer;
use serde_json::{Value, json};

/// Bytes as byte-level BPE writes them: printable ones as themselves, others from U+0100 up.
fn byte_letters() -> Vec<char> {
    let printable = |byte: u32| {
        (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte)
    };
    let mut others = 0;
    (0..256u32)
        .map(|byte| {
            if printable(byte) {
                return char::from_u32(byte).unwrap();
            }
            others += 1;
            char::from_u32(255 + others).unwrap()
        })
        .collect()
}

fn added(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

fn tokenizer(json: Value) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::new(json.to_string().parse().unwrap()))
}

/// GPT-2's kind: every byte is a token, some pairs are merged, one control token.
pub fn byte_level() -> Arc<Tokenizer> {
    let letters = byte_letters();
    let mut vocabulary: Vec<String> = letters.iter().map(char::to_string).collect();
    let mut merges = vec![];
    for text in ["he", "th", " t", "é", "日", "😀", "in"] {
        let spelled: Vec<String> = text
            .bytes()
            .map(|byte| letters[byte as usize].to_string())
            .collect();
        let mut left = spelled[0].clone();
        for right in &spelled[1..] {
            merges.push(json!([left, right]));
            left.push_str(right);
            vocabulary.push(left.clone());
        }
    }
    let special = vocabulary.len();
    let ids: serde_json::Map<_, _> = vocabulary
        .into_iter()
        .zip(0..)
        .map(|(token, id)| (token, json!(id)))
        .collect();
    tokenizer(json!({
        "version": "1.0", "added_tokens": [added(special, "<|end|>")], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": ids, "merges": merges}
    }))
}

/// Llama 2's kind: pieces with a mark for spaces, bytes for what has no piece.
pub fn sentence_piece() -> Arc<Tokenizer> {
    let mut vocabulary: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    vocabulary.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocabulary.extend(
        [
            "▁", "a", "b", "t", "h", "e", "é", "▁t", "▁th", "▁the", "▁▁", ".",
        ]
        .map(String::from),
    );
    let merges = json!([["▁", "t"], ["▁t", "h"], ["▁th", "e"], ["▁", "▁"]]);
    let ids: serde_json::Map<_, _> = vocabulary
        .into_iter()
        .zip(0..)
        .map(|(token, id)| (token, json!(id)))
        .collect();
    tokenizer(json!({
        "version": "1.0", "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                  "vocab": ids, "merges": merges}
    }))
}

/// T5's kind: unigram pieces, spaces restored by the Metaspace decoder.
pub fn metaspace() -> Arc<Tokenizer> {
    let pieces = [
        "<unk>", "</s>", "▁", "▁the", "▁a", "s", "a", "b", "é", "日本", "▁▁",
    ];
    let vocabulary: Vec<Value> = pieces.iter().map(|piece| json!([piece, -1.0])).collect();
    tokenizer(json!({
        "version": "1.0", "added_tokens": [added(1, "</s>")], "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": false}
    }))
}

/// BERT's kind: pieces that continue a word are marked, punctuation loses its space.
pub fn word_piece() -> Arc<Tokenizer> {
    let pieces = ["[UNK]", "[SEP]", "the", "##s", "##é", "cat", ".", ",", "日"];
    let ids: serde_json::Map<_, _> = pieces
        .iter()
        .zip(0..)
        .map(|(token, id)| (token.to_string(), json!(id)))
        .collect();
    tokenizer(json!({
        "version": "1.0", "added_tokens": [added(1, "[SEP]")], "normalizer": null,
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": ids}
    }))
}
