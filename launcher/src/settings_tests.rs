use clap::{CommandFactory, Parser};
use proptest::prelude::*;

use super::*;

fn check(flags: &[&str]) -> Result<Settings, Failure> {
    check_with(flags, &[])
}

fn check_with(flags: &[&str], variables: &[(&str, &str)]) -> Result<Settings, Failure> {
    let environment = Environment::of(variables);
    let args = Args::try_parse_from([&["text-generation-launcher"], flags].concat())
        .expect("flags that exist");
    Settings::check(args, &environment)
}

/// Every flag of text-generation-inference 3's launcher, with a value.
const KNOWN_ELSEWHERE: &[&str] = &[
    "--model-id=m",
    "--revision=r",
    "--validation-workers=2",
    "--sharded=true",
    "--num-shard=2",
    "--quantize=awq",
    "--speculate=2",
    "--dtype=float16",
    "--kv-cache-dtype=fp8_e5m2",
    "--trust-remote-code",
    "--max-concurrent-requests=9",
    "--max-best-of=2",
    "--max-stop-sequences=4",
    "--max-top-n-tokens=5",
    "--max-input-tokens=10",
    "--max-input-length=10",
    "--max-total-tokens=20",
    "--waiting-served-ratio=0.3",
    "--max-batch-prefill-tokens=10",
    "--max-batch-total-tokens=10",
    "--max-waiting-tokens=20",
    "--max-batch-size=3",
    "--cuda-graphs=1,2",
    "--hostname=::1",
    "--port=3000",
    "-p=3000",
    "--prometheus-port=9000",
    "--shard-uds-path=/x",
    "--master-addr=localhost",
    "--master-port=29500",
    "--huggingface-hub-cache=/x",
    "--weights-cache-override=/x",
    "--disable-custom-kernels",
    "--cuda-memory-fraction=0.5",
    "--rope-scaling=linear",
    "--rope-factor=2",
    "--json-output",
    "--otlp-endpoint=x",
    "--otlp-service-name=x",
    "--cors-allow-origin=x",
    "--api-key=k",
    "--watermark-gamma=0.5",
    "--watermark-delta=2",
    "--ngrok",
    "--ngrok-authtoken=x",
    "--ngrok-edge=x",
    "--env",
    "-e",
    "--max-client-batch-size=4",
    "--lora-adapters=a,b",
    "--usage-stats=on",
    "--payload-limit=100",
    "--enable-prefill-logprobs",
    "--graceful-termination-timeout=90",
    "-g=90",
    "--tokenizer-config-path=x",
    "--disable-grammar-support",
];

#[test]
fn every_flag_known_elsewhere_is_understood() {
    for flag in KNOWN_ELSEWHERE {
        let parsed = Args::try_parse_from(["text-generation-launcher", flag]);
        assert!(
            parsed.is_ok(),
            "{flag}: {}",
            parsed.expect_err("an error").render()
        );
    }
}

#[test]
fn sizes_of_graphs_are_numbers_of_rows_or_0_alone() {
    let sizes = |text: &str| {
        let flag = format!("--cuda-graphs={text}");
        Args::try_parse_from(["text-generation-launcher", &flag])
            .map(|args| args.sharding.cuda_graphs.to_string())
            .map_err(|error| error.to_string())
    };
    assert_eq!(sizes("1,2, 40"), Ok("1,2,40".to_owned()));
    assert_eq!(sizes("0"), Ok("0".to_owned()));
    for wrong in ["0,1", "", "a", "1,,2", "-1"] {
        let error = sizes(wrong).expect_err(wrong);
        assert!(error.contains("is no number of rows"), "{error}");
    }
}

#[test]
fn every_long_flag_known_elsewhere_has_its_variable() {
    let variables = Args::variables();
    // `--env` and `--hostname` differ on purpose: see the flags' own texts.
    for flag in KNOWN_ELSEWHERE
        .iter()
        .filter(|flag| flag.starts_with("--") && **flag != "--env")
    {
        let name = flag
            .trim_start_matches('-')
            .split('=')
            .next()
            .expect("a name")
            .replace('-', "_")
            .to_uppercase();
        assert!(variables.contains(&name), "{name}");
    }
}

#[test]
fn quantize_takes_the_names_known_elsewhere() {
    for name in
        "awq compressed-tensors eetq gptq marlin bitsandbytes bitsandbytes-nf4 bitsandbytes-fp4 fp8 \
         int8 int4"
            .split(' ')
    {
        let settings = check(&["--model-id", "m", "--quantize", name]).expect(name);
        assert_eq!(settings.quantize.expect("a format").name(), name);
    }
}

#[test]
fn the_kv_cache_takes_every_format_by_its_name() {
    for name in [
        "auto",
        "float32",
        "bfloat16",
        "float16",
        "fp8_e4m3fn",
        "fp8_e5m2",
        "int8",
    ] {
        let settings = check(&["--model-id", "m", "--kv-cache-dtype", name]).expect(name);
        assert_eq!(settings.kv_cache_dtype.name(), name);
    }
}

#[test]
fn what_would_change_the_service_is_refused_with_its_reason() {
    for (flags, words) in [
        (["--ngrok", "--model-id=m"], "tunnel"),
        (["--quantize=exl2", "--model-id=m"], "exl2"),
        (["--rope-factor=2", "--model-id=m"], "config.json"),
        (
            ["--tokenizer-config-path=x", "--model-id=m"],
            "tokenizer_config.json",
        ),
        (
            ["--lora-dir=/no/such/folder", "--model-id=m"],
            "/no/such/folder",
        ),
        (["--max-input-tokens=9", "--model-id=m"], ""),
    ] {
        let outcome = check(&flags);
        if words.is_empty() {
            assert!(outcome.is_ok());
            continue;
        }
        let failure = outcome.expect_err(flags[0]);
        assert_eq!(failure.code, crate::failure::Code::Config);
        assert!(failure.message.contains(words), "{failure}");
    }
}

#[test]
fn what_has_no_effect_is_accepted_with_one_remark() {
    let settings = check(&[
        "--model-id=m",
        "--usage-stats=on",
        "--waiting-served-ratio=1.2",
        "--max-waiting-tokens=4",
    ])
    .expect("accepted");
    let about = |word: &str| {
        settings
            .remarks
            .iter()
            .filter(|remark| remark.contains(word))
            .count()
    };
    assert_eq!(
        (
            about("nothing is ever sent"),
            about("--waiting-served-ratio")
        ),
        (1, 1)
    );
}

/// Every flag that LoRAX's launcher has beyond those above, with a value and what is said of it.
const KNOWN_IN_LORAX: &[(&str, &str)] = &[
    ("--adapter-id=a", "--lora-ids"),
    ("--source=s3", "folder"),
    ("--adapter-source=pbase", "folder"),
    ("--source=hub", "hub"),
    ("--adapter-source=hub", "hub"),
    ("--preloaded-adapter-ids=a", "--lora-ids"),
    ("--preloaded-adapter-source=hub", "--lora-ids"),
    ("--merge-adapter-weights", "side by side"),
    ("--predibase-api-token=t", "folders"),
    ("--max-active-adapters=9", "--adapter-bytes"),
    ("--adapter-cycle-time-s=2", "--adapter-bytes"),
    ("--adapter-memory-fraction=0.1", "--adapter-bytes"),
    ("--eager-prefill=true", "in parts"),
    ("--chunked-prefill", "in parts"),
    ("--chunked-prefill=true", "in parts"),
    ("--prefix-caching=true", "in parts"),
    ("--compile", "--cuda-graphs"),
    ("--compile-max-batch-size=8", "--cuda-graphs"),
    ("--compile-max-rank=8", "--cuda-graphs"),
    ("--compile-batch-size=8", "--cuda-graphs"),
    ("--backend=fa2", "--attention"),
    ("--disable-sgmv", "kernels"),
    ("--memory-wiggle-room=0.9", "memory"),
    ("--embedding-model=true", "text only"),
    ("--embedding-dim=8", "text only"),
    ("--download-only", "download-weights"),
    ("--cors-allow-header=x", "--cors-allow-origin"),
    ("--cors-expose-header=x", "--cors-allow-origin"),
    ("--cors-allow-method=GET", "--cors-allow-origin"),
    ("--cors-allow-credentials=true", "--cors-allow-origin"),
];

#[test]
fn flags_of_lorax_are_answered_with_what_stands_in_their_place() {
    for (flag, words) in KNOWN_IN_LORAX {
        let said = match check(&["--model-id=m", flag]) {
            Ok(settings) => settings.remarks.join("\n"),
            Err(failure) => failure.message,
        };
        let name = flag.split('=').next().expect("a name");
        assert!(
            said.contains(name) && said.contains(words),
            "{flag}: {said}"
        );
    }
    let settings = check(&["--model-id=m", "--speculative-tokens=3"]).expect("the same as ours");
    assert_eq!(settings.limits.speculate, Some(3));
}

#[test]
fn a_default_source_of_adapters_needs_leave_to_load_from_it() {
    for (source, flag) in [("hub", "--allow-dynamic-lora"), ("local", "--lora-dir=/")] {
        let asked = ["--model-id=m", "--default-adapter-source", source];
        let failure = check(&asked).expect_err("not allowed");
        let name = flag.split('=').next().expect("a name");
        assert!(failure.message.contains(name), "{failure}");
        assert!(check(&[&asked[..], &[flag]].concat()).is_ok(), "{source}");
    }
}

#[test]
fn a_missing_model_is_named() {
    assert!(
        check(&[])
            .expect_err("no model")
            .message
            .contains("--model-id")
    );
}

#[test]
fn a_public_address_needs_a_key() {
    for public in ["0.0.0.0", "::", "192.168.1.4", "example.org"] {
        let bare = check(&["--model-id=m", "--hostname", public]).expect_err(public);
        assert!(bare.message.contains("API_KEY"), "{bare}");
        assert!(check(&["--model-id=m", "--hostname", public, "--api-key=k"]).is_ok());
        assert!(
            check(&[
                "--model-id=m",
                "--hostname",
                public,
                "--allow-unauthenticated"
            ])
            .is_ok()
        );
    }
    for own in ["127.0.0.1", "localhost", "::1", "127.0.0.9"] {
        assert!(check(&["--model-id=m", "--hostname", own]).is_ok(), "{own}");
    }
}

#[test]
fn second_names_of_variables_are_read_when_the_first_is_not_set() {
    let variables = [
        ("HF_MODEL_ID", "org/m"),
        ("LORA_ADAPTERS", "a=x,b=y"),
        ("SM_NUM_GPUS", "4"),
        ("HF_MODEL_QUANTIZE", "gptq"),
    ];
    let settings = check_with(&[], &variables).expect("a model from the environment");
    assert_eq!(
        (
            settings.model_id.as_str(),
            settings.num_shard,
            settings.adapters.len()
        ),
        ("org/m", Some(4), 2)
    );
    assert_eq!(
        check_with(&["--model-id=own"], &variables)
            .expect("the flag wins")
            .model_id,
        "own"
    );
    assert!(
        check_with(&["--model-id=m"], &[("SM_NUM_GPUS", "many")])
            .expect_err("no number")
            .message
            .contains("many")
    );
}

#[test]
fn a_key_is_never_printed() {
    let settings = check(&["--model-id=m", "--api-key=hunter2"]).expect("accepted");
    assert!(!format!("{settings:?}").contains("hunter2"));
}

proptest! {
    #[test]
    fn random_flags_never_panic(picks in prop::collection::vec((any::<prop::sample::Index>(), ".{0,12}"), 0..8)) {
        let flags: Vec<String> = Args::command().get_arguments().filter_map(|flag| flag.get_long()).map(str::to_owned).collect();
        let mut line = vec!["text-generation-launcher".to_owned()];
        for (pick, value) in picks {
            line.push(format!("--{}", flags[pick.index(flags.len())]));
            line.push(value);
        }
        if let Ok(args) = Args::try_parse_from(&line) {
            let environment = Environment::from_variables(Vec::new(), PathBuf::from("/opt/bin/launcher"));
            let _outcome = Settings::check(args, &environment);
        }
    }
}
