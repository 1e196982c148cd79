//! Where the model processes compute, and how many of them there are: a pure function of flags and machine.

use crate::args::{Attention, Device};
use crate::failure::{Code, Failure};
use crate::machine::{Gpu, Machine};
use crate::settings::Settings;

/// The processors of one instance's model processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The host's, which all model processes share.
    Cpu { shards: u32 },
    /// One GPU for each model process, in the order of their ranks.
    Cuda(Vec<Gpu>),
}

impl Place {
    /// GPUs where there are some and nothing else was said, and then all that are visible.
    pub fn choose(settings: &Settings, machine: &Machine) -> Result<Self, Failure> {
        let gpus = &machine.gpus;
        let on_cpu = match settings.device {
            Device::Cpu => true,
            Device::Cuda => false,
            Device::Auto => gpus.is_empty(),
        };
        if on_cpu && settings.attention == Attention::Flashinfer {
            return Err(Failure::new(
                Code::Device,
                "--attention flashinfer computes on GPUs, and the model would run on the CPU; leave it out, or let a GPU be seen",
            ));
        }
        if on_cpu {
            let shards = settings.num_shard.unwrap_or(1);
            return Ok(Self::Cpu { shards });
        }
        let all = gpus.len().max(1) as u32;
        let asked = match (settings.num_shard, settings.sharded) {
            (Some(shards), _) => shards,
            (None, Some(false)) => 1,
            (None, _) => all,
        };
        if asked as usize > gpus.len() {
            return Err(Failure::new(
                Code::Device,
                format!(
                    "a GPU for each model process makes {asked}, and {} are visible; lower --num-shard, name more of them in \
                     CUDA_VISIBLE_DEVICES, or pass --device cpu",
                    gpus.len()
                ),
            ));
        }
        Ok(Self::Cuda(gpus[..asked as usize].to_vec()))
    }

    /// Model processes.
    pub fn shards(&self) -> u32 {
        match self {
            Self::Cpu { shards } => *shards,
            Self::Cuda(gpus) => gpus.len() as u32,
        }
    }

    /// What a shard is told of it.
    pub fn arguments(&self, settings: &Settings) -> Vec<String> {
        let share = settings.cuda_memory_fraction.to_string();
        let attention = settings.attention.name();
        let graphs = settings.cuda_graphs.to_string();
        let told: &[&str] = match self {
            Self::Cpu { .. } => &["--device", "cpu"],
            Self::Cuda(_) => &[
                "--device",
                "cuda",
                "--cuda-memory-fraction",
                &share,
                "--attention",
                &attention,
                "--cuda-graphs",
                &graphs,
            ],
        };
        let mut words: Vec<_> = told.iter().map(|&word| word.to_owned()).collect();
        if settings.strict_kernels {
            words.push("--strict-kernels".to_owned());
        }
        words
    }

    /// What its memory is called.
    pub fn memory(&self) -> &'static str {
        match self {
            Self::Cpu { .. } => "main memory",
            Self::Cuda(_) => "GPU memory",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Environment};

    fn settings(flags: &[&str]) -> Settings {
        let args =
            Args::try_parse_from([&["text-generation-launcher", "--model-id=m"], flags].concat())
                .expect("flags");
        Settings::check(args, &Environment::default()).expect("settings")
    }

    fn choose(flags: &[&str], gpus: usize) -> Result<Place, Failure> {
        let machine = Machine {
            gpus: vec![Gpu::default(); gpus],
            ..Machine::default()
        };
        Place::choose(&settings(flags), &machine)
    }

    fn found(flags: &[&str], gpus: usize) -> (&'static str, u32) {
        match choose(flags, gpus).expect("a place") {
            Place::Cpu { shards } => ("cpu", shards),
            Place::Cuda(gpus) => ("cuda", gpus.len() as u32),
        }
    }

    #[test]
    fn without_a_gpu_one_process_computes_on_the_processors_unless_more_are_asked_for() {
        assert_eq!(found(&[], 0), ("cpu", 1));
        assert_eq!(found(&["--sharded=true"], 0), ("cpu", 1));
        assert_eq!(found(&["--num-shard=3"], 0), ("cpu", 3));
        assert_eq!(found(&["--device=cpu"], 8), ("cpu", 1));
    }

    #[test]
    fn every_visible_gpu_has_a_process_unless_fewer_are_asked_for() {
        assert_eq!(found(&[], 4), ("cuda", 4));
        assert_eq!(found(&["--sharded=true"], 2), ("cuda", 2));
        assert_eq!(found(&["--sharded=false"], 4), ("cuda", 1));
        assert_eq!(found(&["--num-shard=2", "--device=cuda"], 4), ("cuda", 2));
    }

    #[test]
    fn a_shard_is_told_where_to_compute() {
        let told = |flags: &[&str], gpus| {
            let place = choose(flags, gpus).expect("a place");
            place.arguments(&settings(flags)).join(" ")
        };
        assert_eq!(told(&["--cuda-memory-fraction=0.5"], 0), "--device cpu");
        assert_eq!(
            told(&["--strict-kernels", "--cuda-memory-fraction=0.5"], 2),
            "--device cuda --cuda-memory-fraction 0.5 --attention auto --cuda-graphs 1,2,4,8,16,32 --strict-kernels"
        );
        for (asked, served) in [
            ("flashinfer", "flashinfer"),
            ("native", "native"),
            ("paged", "native"),
            ("flashdecoding", "native"),
        ] {
            let told = told(&["--attention", asked], 1);
            assert!(told.contains(&format!("--attention {served} ")), "{told}");
        }
        for sizes in ["0", "2,6"] {
            let told = told(&["--cuda-graphs", sizes], 1);
            assert!(told.ends_with(&format!("--cuda-graphs {sizes}")), "{told}");
        }
    }

    #[test]
    fn what_computes_attention_on_gpus_only_is_refused_on_the_processors() {
        for (flags, gpus) in [
            (&["--attention=flashinfer"][..], 0),
            (&["--attention=flashinfer", "--device=cpu"], 2),
        ] {
            let failure = choose(flags, gpus).expect_err("a refusal");
            assert_eq!(failure.code, Code::Device);
            assert!(
                failure
                    .message
                    .starts_with("--attention flashinfer computes on GPUs"),
                "{failure}"
            );
        }
        assert_eq!(found(&["--attention=paged"], 0), ("cpu", 1));
    }

    #[test]
    fn more_processes_than_gpus_are_refused() {
        for (flags, gpus) in [
            (&["--num-shard=3"][..], 2),
            (&["--device=cuda"], 0),
            (&["--device=cuda", "--num-shard=2"], 0),
        ] {
            let failure = choose(flags, gpus).expect_err("a refusal");
            assert_eq!(failure.code, Code::Device);
            let said = format!("{gpus} are visible; lower --num-shard");
            assert!(failure.message.contains(&said), "{failure}");
        }
    }
}
