//! Joined deltas are the decoding of the whole, whatever the tokenizer and whatever the ids.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use kvrun_text::{Detokenizer, Tokenizer};
use proptest::prelude::*;

fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone());
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    pieces.push(detokenizer.flush());
    pieces
}

fn check(tokenizer: Arc<Tokenizer>, seeds: &[u32]) {
    let vocabulary = tokenizer.vocabulary() as u32;
    let ids: Vec<u32> = seeds.iter().map(|seed| seed % vocabulary).collect();
    assert_eq!(
        stream(&tokenizer, &ids).concat(),
        tokenizer.decode(&ids, true),
        "{ids:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_ids_of_byte_level_bpe(ids in prop::collection::vec(any::<u32>(), 0..24)) {
        check(support::byte_level(), &ids);
    }

    #[test]
    fn any_ids_of_a_sentence_piece_model(ids in prop::collection::vec(any::<u32>(), 0..24)) {
        check(support::sentence_piece(), &ids);
    }

    #[test]
    fn mostly_pieces_of_a_sentence_piece_model(ids in prop::collection::vec(250u32..271, 0..24)) {
        check(support::sentence_piece(), &ids);
    }

    #[test]
    fn any_ids_of_a_unigram_model(ids in prop::collection::vec(any::<u32>(), 0..24)) {
        check(support::metaspace(), &ids);
    }

    #[test]
    fn any_ids_of_a_word_piece_model(ids in prop::collection::vec(any::<u32>(), 0..24)) {
        check(support::word_piece(), &ids);
    }

    #[test]
    fn text_comes_back_and_no_piece_holds_half_a_character(text in "[a-zé日本😀👩‍👩‍👧 \n]{0,40}") {
        let tokenizer = support::byte_level();
        let ids = tokenizer.encode(&text, false).unwrap().ids;
        let pieces = stream(&tokenizer, &ids);
        prop_assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{:?}", pieces);
        prop_assert_eq!(pieces.concat(), text);
    }
}

#[test]
fn a_split_character_comes_whole_with_its_last_byte() {
    let tokenizer = support::byte_level();
    // The merges end at the whole emoji, so its bytes are asked for one by one.
    let ids: Vec<u32> = "a👩b".bytes().map(u32::from).collect();
    assert_eq!(stream(&tokenizer, &ids), ["a", "", "", "", "👩", "b", ""]);
}

#[test]
fn bytes_that_never_become_a_character_are_replaced_at_the_end() {
    let tokenizer = support::byte_level();
    assert_eq!(
        stream(&tokenizer, &[u32::from(b'a'), 0xE6, 0x97]),
        ["a", "", "", "\u{fffd}"]
    );
}

#[test]
fn the_space_before_a_later_word_survives() {
    let tokenizer = support::sentence_piece();
    let the = tokenizer.id_of("▁the").unwrap();
    assert_eq!(stream(&tokenizer, &[the, 2, the]), ["the", "", " the", ""]);
}

#[test]
fn special_tokens_have_a_name_but_no_text() {
    let tokenizer = support::sentence_piece();
    assert_eq!(tokenizer.token_text(2), "</s>");
    assert!(tokenizer.is_special(2));
    assert_eq!(stream(&tokenizer, &[1, 2]).concat(), "");
}
