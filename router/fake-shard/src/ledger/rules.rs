//! What a row may do, given what its sequence and its pages hold.

use super::{Breach, Sequence, Sizes};
use crate::tokens;
use kvrun_proto::{Row, Token};

pub(super) fn check_row(row: &Row, sequence: &Sequence, sizes: &Sizes) -> Result<(), Breach> {
    let id = row.sequence;
    let (start, end) = (row.start, u64::from(row.start) + u64::from(row.tokens));
    let (known, drafts) = (sequence.tokens.len() as u64, row.drafts.len() as u64);
    let first = sequence.computed == 0;
    rule!(row.tokens >= 1, "sequence {id}: a row without tokens");
    rule!(
        !(first && sizes.recurrent) || start == 0,
        "sequence {id}: a recurrent state begins at {start}"
    );
    if sizes.images.is_some_and(|images| images.together) {
        sequence.beside.check_borders(row)?;
    }
    rule!(
        drafts == 0 || (row.sample && !sizes.recurrent && drafts < u64::from(row.tokens)),
        "sequence {id}: {drafts} drafts need sample, a known token before them and a state that can be taken back"
    );
    let foreign = row.drafts.iter().find(|&&draft| draft >= sizes.vocabulary);
    rule!(
        foreign.is_none(),
        "sequence {id}: draft {foreign:?} is outside the vocabulary"
    );
    rule!(
        first || start == sequence.computed,
        "sequence {id}: row starts at {start}, {} tokens are computed",
        sequence.computed
    );
    rule!(
        end <= known + drafts,
        "sequence {id}: row ends at {end}, {known} tokens are known and {drafts} drafted"
    );
    rule!(
        end <= u64::from(sizes.positions),
        "sequence {id}: row ends at {end}, the model has {} positions",
        sizes.positions
    );
    rule!(
        row.sample == (end == known + drafts),
        "sequence {id}: sample is {} at {end} of {known} and {drafts} drafts",
        row.sample
    );
    let room = sequence.pages.len() as u64 * u64::from(sizes.page_tokens);
    rule!(
        end <= room,
        "sequence {id}: row ends at {end}, its pages hold {room}"
    );
    Ok(())
}

/// Everything before `start` must lie in the sequence's pages, written under the same tokens and adapter.
pub(super) fn read(
    sequence: &Sequence,
    start: usize,
    width: usize,
    pages: &[Vec<u64>],
    id: u64,
) -> Result<(), Breach> {
    for (place, &page) in sequence.pages.iter().enumerate() {
        let begin = place * width;
        if begin >= start {
            break;
        }
        let last = (begin + width).min(start) - 1;
        let found = pages[page as usize].get(last - begin);
        rule!(
            found == Some(&sequence.chains[last]),
            "sequence {id}: page {page} does not hold its tokens {begin}..={last} under its adapter"
        );
    }
    Ok(())
}

/// Pages that a sequence begins with must have been filled by steps that the router had the answers of.
pub(super) fn check_shared(
    row: &Row,
    sequence: &Sequence,
    width: usize,
    written: &[u64],
    answered: u64,
) -> Result<(), Breach> {
    let shared = &sequence.pages[..(row.start as usize).div_ceil(width)];
    let early = shared
        .iter()
        .find(|&&page| written[page as usize] > answered);
    rule!(
        early.is_none(),
        "sequence {} begins with page {early:?}, written by a step after {answered}, the last one answered",
        row.sequence
    );
    Ok(())
}

pub(super) fn write(
    sequence: &Sequence,
    row: &Row,
    width: usize,
    pages: &mut [Vec<u64>],
    users: &[u32],
) -> Result<(), Breach> {
    for position in row.start as usize..(row.start + row.tokens) as usize {
        let page = sequence.pages[position / width] as usize;
        let slot = position % width;
        rule!(
            users[page] == 1,
            "sequence {}: writes to page {page}, which {} sequences hold",
            row.sequence,
            users[page]
        );
        // What lies behind the slot belongs to an earlier owner of the page.
        pages[page].truncate(slot);
        rule!(
            pages[page].len() == slot,
            "sequence {}: page {page} has a gap before slot {slot}",
            row.sequence
        );
        pages[page].push(sequence.chains[position]);
    }
    Ok(())
}

pub(super) fn prompt_tokens(sequence: &Sequence, row: &Row, vocabulary: u32) -> Vec<Token> {
    (row.start.max(1)..(row.start + row.tokens).min(sequence.prompt_tokens))
        .map(|position| {
            let position = position as usize;
            let top = sequence.sampling.top_logprobs;
            tokens::observed(
                sequence.chain_before(position),
                sequence.tokens[position],
                top,
                vocabulary,
            )
        })
        .collect()
}
