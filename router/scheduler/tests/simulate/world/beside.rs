//! What requests have beside ids, by the kind of model that a seed is about.

use super::{Sizes, VOCABULARY};
use kvrun_fake_shard::ledger::ImageSizes;
use kvrun_fake_shard::tokens;
use kvrun_scheduler::{Model, Request, Span};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::sync::Arc;

/// The id that answers of an encoder-decoder model follow.
const START: u32 = 4;
/// The id that stands for a part of an image.
const PLACEHOLDER: u32 = 5;
/// Pictures that clients have, and how many ids each becomes.
const PICTURES: [(u8, u32); 4] = [(b'a', 3), (b'b', 3), (b'c', 7), (b'd', 1)];

/// The kind of model a seed is about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Plain,
    Recurrent,
    Encoder,
    Images(ImageSizes),
}

impl Kind {
    pub(super) fn any(rng: &mut StdRng) -> Self {
        match rng.random_range(0..12) {
            0 => Self::Recurrent,
            1 | 2 => Self::Encoder,
            3..6 => Self::Images(ImageSizes {
                together: rng.random(),
                memory: if rng.random_bool(0.3) { 3 } else { 0 },
            }),
            _ => Self::Plain,
        }
    }

    pub(super) fn sizes(self) -> Sizes {
        Sizes {
            recurrent: matches!(self, Self::Recurrent),
            decoder_start: matches!(self, Self::Encoder).then_some(START),
            images: match self {
                Self::Images(sizes) => Some(sizes),
                _ => None,
            },
            ..Sizes::default()
        }
    }

    pub(super) fn model(self) -> Model {
        Model {
            recurrent: matches!(self, Self::Recurrent),
            together: matches!(self, Self::Images(sizes) if sizes.together),
            ..Model::default()
        }
    }
}

/// An encoder's source, or images and where their ids begin.
#[derive(Debug, Clone, Default)]
pub(super) struct Beside {
    pub(super) source: Vec<u32>,
    pub(super) images: Vec<(u32, (u8, u32))>,
}

impl Beside {
    /// Takes or adds what the kind of model has beside a prompt's ids.
    pub(super) fn any(kind: Kind, prompt: &mut Vec<u32>, rng: &mut StdRng) -> Self {
        match kind {
            Kind::Plain | Kind::Recurrent => Self::default(),
            Kind::Encoder => Self {
                source: std::mem::replace(prompt, vec![START]),
                images: Vec::new(),
            },
            Kind::Images(_) => Self {
                source: Vec::new(),
                images: illustrate(prompt, rng),
            },
        }
    }

    pub(super) fn memory_tokens(&self, kind: Kind) -> u32 {
        let each = match kind {
            Kind::Images(sizes) => sizes.memory,
            _ => 0,
        };
        self.source.len() as u32 + each * self.images.len() as u32
    }

    pub(super) fn spans(&self) -> Arc<[Span]> {
        let span = |&(start, (picture, tokens)): &(u32, (u8, u32))| Span {
            start,
            tokens,
            digest: [picture; 32],
        };
        self.images.iter().map(span).collect()
    }

    /// Ids of the largest image that must not be cut.
    pub(super) fn largest(&self, kind: Kind) -> u32 {
        let indivisible = kind.model().together;
        let tokens = self.images.iter().map(|(_, (_, tokens))| *tokens);
        tokens.filter(|_| indivisible).max().unwrap_or(0)
    }

    pub(super) fn wire(&self) -> Vec<kvrun_proto::Image> {
        let image = |&(at, (picture, tokens)): &(u32, (u8, u32))| kvrun_proto::Image {
            data: vec![picture],
            at,
            tokens,
        };
        self.images.iter().map(image).collect()
    }

    /// The answer alone.
    pub(super) fn answer(
        &self,
        request: &Request,
        digest: &str,
        sampling: &kvrun_proto::Sampling,
        long: bool,
    ) -> Vec<u32> {
        let seen = |picture: u8| tokens::seen(&[picture]);
        let source: Vec<u64> = self.source.iter().map(|&token| u64::from(token)).collect();
        let root = match long {
            true => tokens::root_of_long(tokens::root(digest)),
            false => tokens::root(digest),
        };
        let mut chain = tokens::root_beside(root, &source);
        for (position, &id) in (0..).zip(request.prompt.iter()) {
            let here = |(start, (_, tokens)): &&(u32, (u8, u32))| {
                (*start..start + tokens).contains(&position)
            };
            let image = self.images.iter().find(here);
            chain = tokens::extend_seen(
                chain,
                id,
                image.map_or(0, |(_, (picture, _))| seen(*picture)),
            );
        }
        tokens::answer_after(
            chain,
            sampling,
            request.max_new_tokens,
            &request.end_tokens,
            VOCABULARY,
        )
    }
}

/// Puts up to three pictures among a prompt's ids.
fn illustrate(prompt: &mut Vec<u32>, rng: &mut StdRng) -> Vec<(u32, (u8, u32))> {
    let count = rng.random_range(0..4);
    let mut places: Vec<usize> = (0..count)
        .map(|_| rng.random_range(0..=prompt.len()))
        .collect();
    places.sort_unstable();
    let (mut images, mut added) = (Vec::new(), 0);
    for place in places {
        let Some(&(picture, tokens)) = PICTURES.choose(rng) else {
            continue;
        };
        let start = place + added;
        prompt.splice(start..start, (0..tokens).map(|_| PLACEHOLDER));
        images.push((start as u32, (picture, tokens)));
        added += tokens as usize;
    }
    images
}
