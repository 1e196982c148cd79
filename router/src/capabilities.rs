//! What a model can do follows from what its sequences keep on the shards, never from its name.

use kvrun_proto::Description;

/// Most tokens of a sequence whose state costs the same at any length, where neither model nor operator says otherwise.
const ENDLESS: u32 = 32_768;

/// Tokens of a step, where neither model nor operator wants more.
const USUAL_STEP: u32 = 512;
/// Longest source of an encoder, where neither model nor operator says otherwise.
const USUAL_SOURCE: u32 = 4096;

/// Something that other models do and this one does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Off {
    /// Its name in `/info`.
    pub feature: &'static str,
    /// Why.
    pub reason: &'static str,
}

/// Whether sequences keep a recurrent state.
pub fn is_recurrent(model: &Description) -> bool {
    keeps(model, "slots")
}

/// Everything that is off for this model.
pub fn off(model: &Description) -> Vec<Off> {
    let row = |feature, reason| Off { feature, reason };
    let mut off = Vec::new();
    if is_recurrent(model) {
        let whole = "a recurrent state holds all of its tokens at once, so that no sequence can begin with a part of another";
        off.push(row("prefix_cache", whole));
        let forward = "a recurrent state cannot be taken back to before a draft that was refused";
        off.push(row("speculation", forward));
    }
    if model.decoder_start.is_some() {
        let own = "every layer reads the source of its own request, so that equal tokens do not make equal pages";
        off.push(row("prefix_cache", own));
        let encoder = "an encoder reads the prompt and predicts none of its tokens";
        off.push(row("prompt_logprobs", encoder));
    }
    off
}

/// Most tokens of one sequence by the model itself; 0 = no limit of its own. `asked` is the operator's, 0 when none.
pub fn positions(model: &Description, asked: u32) -> u32 {
    match (pages_are_free(model), model.positions, asked) {
        (true, 0, 0) => ENDLESS,
        (true, 0, asked) => asked,
        (_, positions, _) => positions,
    }
}

/// Pages to ask for; 0 = as many as the shards' memory holds. Pages without bytes must never be what is short.
pub fn pages(model: &Description, pool_tokens: u64, rows: u32, asked: u32) -> u64 {
    let width = u64::from(model.page_tokens.max(1));
    if pages_are_free(model) {
        let longest = u64::from(positions(model, asked)).div_ceil(width);
        return longest * u64::from(rows);
    }
    pool_tokens.div_ceil(width)
}

/// Most tokens of one step; `asked` and `longest`, of a sequence, are the operator's, 0 when none. An encoder reads a source
/// in one step, so that steps are to hold the longest.
pub fn step_tokens(model: &Description, asked: u32, longest: u32) -> u32 {
    let whole = match (model.decoder_start, longest) {
        (None, _) => 0,
        (Some(_), 0) => USUAL_SOURCE,
        (Some(_), longest) => longest,
    };
    match asked {
        0 => whole.max(USUAL_STEP),
        asked => asked,
    }
}

fn keeps(model: &Description, kind: &str) -> bool {
    model.state_kinds.iter().any(|kept| kept == kind)
}

fn pages_are_free(model: &Description) -> bool {
    is_recurrent(model) && model.page_bytes == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(kinds: &[&str], page_bytes: u64) -> Description {
        Description {
            state_kinds: kinds.iter().map(|&kind| kind.to_owned()).collect(),
            page_bytes,
            page_tokens: 16,
            ..Default::default()
        }
    }

    fn features(model: &Description) -> Vec<&'static str> {
        off(model).iter().map(|off| off.feature).collect()
    }

    #[test]
    fn what_is_off_follows_from_what_is_kept() {
        assert_eq!(features(&model(&["pages"], 1024)), [""; 0]);
        assert_eq!(
            features(&model(&["pages", "slots"], 1024)),
            ["prefix_cache", "speculation"]
        );
        let mut encoder = model(&["pages", "memory"], 1024);
        assert_eq!(
            features(&encoder),
            [""; 0],
            "images are a part of what is shared"
        );
        encoder.decoder_start = Some(0);
        assert_eq!(features(&encoder), ["prefix_cache", "prompt_logprobs"]);
    }

    #[test]
    fn a_step_holds_the_longest_source() {
        let text = model(&["pages"], 1024);
        assert_eq!(
            (step_tokens(&text, 0, 9000), step_tokens(&text, 64, 9000)),
            (512, 64)
        );
        let encoder = Description {
            decoder_start: Some(0),
            ..model(&["pages", "memory"], 1024)
        };
        let steps = |asked, longest| step_tokens(&encoder, asked, longest);
        assert_eq!((steps(0, 0), steps(0, 2000)), (4096, 2000));
        assert_eq!((steps(0, 20), steps(700, 2000)), (512, 700));
    }

    #[test]
    fn pages_without_bytes_are_enough_for_every_row() {
        let mamba = model(&["slots"], 0);
        assert_eq!(pages(&mamba, 100, 4, 0), 4 * u64::from(ENDLESS) / 16);
        assert_eq!(pages(&mamba, 100, 4, 40), 4 * 3);
        assert_eq!((positions(&mamba, 0), positions(&mamba, 40)), (ENDLESS, 40));
        let llama = model(&["pages"], 1024);
        assert_eq!((pages(&llama, 0, 4, 40), pages(&llama, 100, 4, 40)), (0, 7));
        assert_eq!(positions(&llama, 40), 0);
    }
}
