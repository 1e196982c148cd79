//! What a sequence has beside its ids: images among them, and a memory in pages of its own.

use super::{Breach, Sizes};
use crate::tokens;
use kvrun_proto::{Admit, Row};
use std::ops::Range;

/// Images and memory of one sequence.
pub(super) struct Beside {
    /// Positions of each image, and what the fake made of it.
    images: Vec<(Range<u32>, u64)>,
    /// What an encoder is given.
    pub(super) source: Vec<u32>,
    /// What the memory was made of, item by item.
    pub(super) memory: Vec<u64>,
    tokens: u32,
    /// The memory's pages.
    pub(super) pages: Vec<u32>,
}

impl Beside {
    pub(super) fn of(admit: &Admit, sizes: &Sizes) -> Result<Self, Breach> {
        let id = admit.sequence;
        let images = images(admit, sizes)?;
        let (memory, tokens) = match sizes.decoder_start {
            Some(start) => {
                rule!(
                    admit.prompt_tokens == 1 && admit.tokens.first() == Some(&start),
                    "sequence {id}: the answer does not follow id {start}"
                );
                rule!(
                    !admit.memory_tokens.is_empty(),
                    "sequence {id} has no source for the encoder"
                );
                let source = admit.memory_tokens.iter().map(|&token| u64::from(token));
                (source.collect(), admit.memory_tokens.len() as u32)
            }
            None => {
                rule!(
                    admit.memory_tokens.is_empty(),
                    "sequence {id} has a source, the model has no encoder"
                );
                let each = sizes.images.map_or(0, |images| images.memory);
                let looks = images.iter().map(|(_, seen)| *seen).filter(|_| each > 0);
                (looks.collect::<Vec<_>>(), each * images.len() as u32)
            }
        };
        rule!(
            admit.memory_pages.len() == tokens.div_ceil(sizes.page_tokens) as usize,
            "sequence {id}: {} pages for a memory of {tokens} tokens",
            admit.memory_pages.len()
        );
        Ok(Self {
            images,
            source: admit.memory_tokens.clone(),
            memory,
            tokens,
            pages: admit.memory_pages.clone(),
        })
    }

    pub(super) fn memory_tokens(&self) -> u32 {
        self.tokens
    }

    /// The part of the memory that every token reads. An image is read by what stands behind its ids.
    pub(super) fn read_from_the_start(&self) -> &[u64] {
        match self.source.is_empty() {
            true => &[],
            false => &self.memory,
        }
    }

    /// What the pages of the memory hold.
    pub(super) fn memory_chain(&self) -> u64 {
        tokens::root_beside(0, &self.memory)
    }

    /// What the fake made of the image at a position; 0 where there is none.
    pub(super) fn seen_at(&self, position: u32) -> u64 {
        let here = self
            .images
            .iter()
            .find(|(span, _)| span.contains(&position));
        here.map_or(0, |(_, seen)| *seen)
    }

    /// A row that must not cut images begins and ends between them.
    pub(super) fn check_borders(&self, row: &Row) -> Result<(), Breach> {
        for border in [row.start, row.start + row.tokens] {
            let cut = self
                .images
                .iter()
                .find(|(span, _)| span.start < border && border < span.end);
            rule!(
                cut.is_none(),
                "sequence {}: a border at {border} cuts the image of ids {cut:?}",
                row.sequence
            );
        }
        Ok(())
    }

    /// Every page of the memory must hold what was written into it at admission.
    pub(super) fn read(&self, pages: &[Vec<u64>], id: u64) -> Result<(), Breach> {
        let written = [self.memory_chain()];
        for &page in &self.pages {
            rule!(
                pages[page as usize] == written,
                "sequence {id}: page {page} does not hold its memory"
            );
        }
        Ok(())
    }
}

fn images(admit: &Admit, sizes: &Sizes) -> Result<Vec<(Range<u32>, u64)>, Breach> {
    let id = admit.sequence;
    rule!(
        admit.images.is_empty() || sizes.images.is_some(),
        "sequence {id} has images, the model takes none"
    );
    let mut free = 0;
    let mut images = Vec::new();
    for image in &admit.images {
        let end = image.at.saturating_add(image.tokens);
        rule!(
            image.at >= free && image.tokens >= 1 && end <= admit.prompt_tokens,
            "sequence {id}: an image at {}..{end} in a prompt of {}",
            image.at,
            admit.prompt_tokens
        );
        rule!(
            !image.data.is_empty(),
            "sequence {id}: an image of no bytes"
        );
        free = end;
        images.push((image.at..end, tokens::seen(&image.data)));
    }
    Ok(images)
}
