//! The fake model: the next token is a pure hash of the seed, every token before it and the adapter's digest.
//!
//! A lost, repeated, reordered or foreign token therefore changes everything that follows it.

use kvrun_proto::{Alternative, Sampling, Token};
use sha2::{Digest, Sha256};

/// The chain before the first token of a sequence under an adapter; the base model's digest is "".
pub fn root(adapter_digest: &str) -> u64 {
    adapter_digest
        .bytes()
        .fold(0x6b76_2e72_756e, |chain, byte| mix(chain ^ u64::from(byte)))
}

/// The chain before the first token of a sequence that also reads `memory`.
pub fn root_beside(root: u64, memory: &[u64]) -> u64 {
    memory
        .iter()
        .fold(root, |chain, &item| mix(chain ^ mix(item)))
}

/// The chain before the first token of a long sequence.
pub fn root_of_long(root: u64) -> u64 {
    mix(root ^ 0x6c6f_6e67)
}

/// What the fake makes of an image; never 0.
pub fn seen(image: &[u8]) -> u64 {
    let digest = Sha256::digest(image);
    digest
        .iter()
        .take(8)
        .fold(0, |seen, &byte| seen << 8 | u64::from(byte))
        | 1
}

/// The chain after one more token.
pub fn extend(chain: u64, token: u32) -> u64 {
    mix(chain.rotate_left(17) ^ (u64::from(token) + 1))
}

/// The chain after one more id that stands for a part of an image, given what the fake made of it.
pub fn extend_seen(chain: u64, token: u32, seen: u64) -> u64 {
    extend(chain ^ seen, token)
}

/// Samples the token after `chain`; `answered` tokens of the answer exist, ids stay below `limit`.
pub fn sample(chain: u64, sampling: &Sampling, answered: u32, limit: u32) -> Token {
    let seed = if sampling.temperature == 0.0 {
        0
    } else {
        sampling.seed
    };
    let mut state = mix(chain ^ mix(seed));
    let held_back = answered < sampling.suppressed_until;
    while held_back && sampling.suppressed.contains(&below(state, limit)) {
        state = mix(state);
    }
    token(state, sampling.top_logprobs, limit)
}

/// What a prompt token looks like with log-probabilities, given the chain before it.
pub fn observed(chain: u64, id: u32, top: u32, limit: u32) -> Token {
    Token {
        id,
        ..token(mix(chain ^ u64::from(id)), top, limit)
    }
}

/// The whole answer to a prompt alone: at most `count` ids, ended by the first of `end_tokens`.
pub fn answer(
    prompt: &[u32],
    adapter_digest: &str,
    sampling: &Sampling,
    count: u32,
    end_tokens: &[u32],
    limit: u32,
) -> Vec<u32> {
    let chain = prompt
        .iter()
        .fold(root(adapter_digest), |chain, &id| extend(chain, id));
    answer_after(chain, sampling, count, end_tokens, limit)
}

/// The same after the chain of a prompt that holds more than ids.
pub fn answer_after(
    mut chain: u64,
    sampling: &Sampling,
    count: u32,
    end_tokens: &[u32],
    limit: u32,
) -> Vec<u32> {
    let mut ids = Vec::new();
    for answered in 0..count {
        let id = sample(chain, sampling, answered, limit).id;
        ids.push(id);
        chain = extend(chain, id);
        if end_tokens.contains(&id) {
            break;
        }
    }
    ids
}

fn token(state: u64, top: u32, limit: u32) -> Token {
    let mut other = state;
    let top = (0..top)
        .map(|place| {
            let id = below(other, limit);
            other = mix(other);
            Alternative {
                id,
                logprob: logprob(state) - place as f32,
            }
        })
        .collect();
    Token {
        id: below(state, limit),
        logprob: logprob(state),
        top,
    }
}

fn logprob(state: u64) -> f32 {
    -((state >> 40) as f32) / (1 << 22) as f32
}

fn below(state: u64, limit: u32) -> u32 {
    (state % u64::from(limit.max(1))) as u32
}

/// The finaliser of splitmix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_depends_on_seed_adapter_and_every_earlier_token() {
        let warm = |seed| Sampling {
            temperature: 1.0,
            seed,
            ..Default::default()
        };
        let base = answer(&[1, 2, 3], "", &warm(1), 8, &[], 32_000);
        assert_eq!(base, answer(&[1, 2, 3], "", &warm(1), 8, &[], 32_000));
        assert_ne!(base, answer(&[1, 2, 3], "", &warm(2), 8, &[], 32_000));
        assert_ne!(base, answer(&[1, 2, 3], "ab", &warm(1), 8, &[], 32_000));
        assert_ne!(base, answer(&[2, 1, 3], "", &warm(1), 8, &[], 32_000));
    }

    #[test]
    fn an_answer_depends_on_images_and_memory() {
        let after = |chain| answer_after(chain, &Sampling::default(), 8, &[], 32_000);
        let start = root("");
        assert_eq!(
            after(extend(start, 5)),
            answer(&[5], "", &Sampling::default(), 8, &[], 32_000)
        );
        let (cat, dog) = (seen(b"cat"), seen(b"dog"));
        assert_ne!(
            after(extend_seen(start, 5, cat)),
            after(extend_seen(start, 5, dog))
        );
        assert_ne!(
            after(root_beside(start, &[1, 2])),
            after(root_beside(start, &[2, 1]))
        );
        assert_eq!(root_beside(start, &[]), start);
    }

    #[test]
    fn suppressed_ids_wait_for_their_position() {
        let sampling = Sampling {
            suppressed: vec![0],
            suppressed_until: 64,
            ..Default::default()
        };
        assert!(!answer(&[1], "", &sampling, 64, &[], 2).contains(&0));
    }
}
