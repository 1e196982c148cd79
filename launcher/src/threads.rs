//! How many threads each model process computes with, and where: a pure function of flags, processors and place.

use crate::failure::Failure;
use crate::place::Place;
use crate::processors::Processors;

/// The threads of the model processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Threads {
    /// Of each model process.
    pub count: u32,
    /// The processors that each rank is kept to, by their numbers; none of a rank that is kept to none. A rank with as
    /// many threads as it has processors gives each thread its own.
    pub processors: Vec<Vec<u32>>,
    /// A consequence that the operator should know of.
    pub remark: Option<String>,
}

impl Threads {
    /// A thread for each core, cores shared out evenly over the ranks, and no more than control groups grant time for.
    ///
    /// Threads of one core share its memory ports: a second one adds nothing to work bound by memory. So ranks are kept
    /// to one hardware thread of each of their cores, and the other is left to the router; they get both where more
    /// threads than cores are asked for. Where ranks outnumber cores, all run anywhere.
    pub fn choose(
        asked: Option<u32>,
        processors: &Processors,
        place: &Place,
    ) -> Result<Self, Failure> {
        let ranks = place.shards() as usize;
        let cores = processors.cores.len() / ranks;
        let granted = |millis| (millis / 1000) as usize / ranks;
        let default = cores.min(processors.granted_millis.map_or(usize::MAX, granted));
        let count = match asked {
            None => default.max(1),
            Some(count) => possible(count as usize, processors, ranks)?,
        };
        let of_rank = |cores: &[Vec<u32>]| {
            let mut of_it: Vec<_> = match count <= cores.len() {
                true => cores.iter().map(|core| core[0]).collect(),
                false => cores.concat(),
            };
            of_it.sort_unstable();
            of_it
        };
        let kept = matches!(place, Place::Cpu { .. }) && cores > 0;
        let shares = kept.then(|| processors.cores.chunks_exact(cores).take(ranks));
        Ok(Self {
            count: count as u32,
            processors: shares.into_iter().flatten().map(of_rank).collect(),
            remark: remark(count * ranks, processors),
        })
    }

    /// The processors that a rank is kept to.
    pub fn of_rank(&self, rank: u32) -> &[u32] {
        self.processors
            .get(rank as usize)
            .map_or(&[], Vec::as_slice)
    }
}

fn possible(asked: usize, processors: &Processors, ranks: usize) -> Result<usize, Failure> {
    let (there, all) = (processors.count(), asked * ranks);
    let most = (there / ranks).max(1);
    if asked <= most {
        return Ok(asked);
    }
    Err(Failure::config(format!(
        "--num-threads {asked} for each of {ranks} model process{} makes {all}, and this process may run on {there} processor{}; \
         pass {most} or less, leave it out, or widen the affinity mask",
        if ranks == 1 { "" } else { "es" },
        if there == 1 { "" } else { "s" },
    )))
}

fn remark(threads: usize, processors: &Processors) -> Option<String> {
    let millis = processors.granted_millis?;
    (threads as u64 * 1000 > millis).then(|| {
        format!(
            "the control group grants the time of {} processors, so {threads} thread{} will stand still for a part of every period",
            millis as f64 / 1e3,
            if threads == 1 { "" } else { "s" },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Code;
    use crate::machine::Gpu;

    /// Cores of one hardware thread each, or of two numbered as on most machines.
    fn machine(cores: u32, hardware_threads: u32) -> Processors {
        let core = |core| (0..hardware_threads).map(move |thread| core + thread * cores);
        Processors {
            cores: (0..cores).map(|number| core(number).collect()).collect(),
            granted_millis: None,
        }
    }

    fn granted(processors: Processors, millis: u64) -> Processors {
        Processors {
            granted_millis: Some(millis),
            ..processors
        }
    }

    fn choose(asked: Option<u32>, processors: &Processors, shards: u32) -> Threads {
        Threads::choose(asked, processors, &Place::Cpu { shards }).expect("threads")
    }

    /// Threads of each rank, and the processors of each, in the kernel's way to write them.
    fn told(asked: Option<u32>, processors: &Processors, shards: u32) -> (u32, String) {
        let threads = choose(asked, processors, shards);
        let lists = threads.processors.iter();
        let lists: Vec<_> = lists.map(|list| crate::processors::list(list)).collect();
        (threads.count, lists.join(" "))
    }

    #[test]
    fn one_process_has_a_thread_on_every_core() {
        assert_eq!(told(None, &machine(1, 1), 1), (1, "0".into()));
        assert_eq!(told(None, &machine(2, 1), 1), (2, "0-1".into()));
        assert_eq!(told(None, &machine(64, 1), 1), (64, "0-63".into()));
    }

    #[test]
    fn a_second_hardware_thread_of_a_core_is_left_to_others() {
        assert_eq!(told(None, &machine(1, 2), 1), (1, "0".into()));
        assert_eq!(told(None, &machine(64, 2), 1), (64, "0-63".into()));
        assert_eq!(told(Some(65), &machine(64, 2), 1), (65, "0-127".into()));
        assert_eq!(
            told(Some(4), &machine(4, 2), 2),
            (4, "0-1,4-5 2-3,6-7".into())
        );
    }

    #[test]
    fn ranks_share_the_cores_and_none_is_in_two() {
        assert_eq!(told(None, &machine(64, 2), 2), (32, "0-31 32-63".into()));
        assert_eq!(told(None, &machine(8, 1), 3), (2, "0-1 2-3 4-5".into()));
        assert_eq!(told(None, &machine(2, 1), 2), (1, "0 1".into()));
    }

    #[test]
    fn ranks_that_outnumber_the_cores_run_anywhere_with_one_thread() {
        assert_eq!(told(None, &machine(2, 1), 4), (1, String::new()));
        assert_eq!(told(Some(1), &machine(2, 1), 4), (1, String::new()));
    }

    #[test]
    fn a_quota_bounds_the_threads_and_leaves_them_free_on_the_cores() {
        let quota = |millis| granted(machine(64, 1), millis);
        assert_eq!(told(None, &quota(4000), 1), (4, "0-63".into()));
        assert_eq!(told(None, &quota(3500), 1), (3, "0-63".into()));
        assert_eq!(told(None, &quota(500), 1), (1, "0-63".into()));
        assert_eq!(told(None, &quota(4000), 2), (2, "0-31 32-63".into()));
        assert_eq!(told(None, &quota(128_000), 1), (64, "0-63".into()));
        assert_eq!(choose(None, &quota(4000), 1).remark, None);
    }

    #[test]
    fn threads_beyond_a_quota_are_remarked_upon() {
        let quota = granted(machine(64, 1), 3500);
        let remark = choose(Some(4), &quota, 1).remark.expect("a remark");
        assert!(remark.contains("3.5 processors, so 4 threads"), "{remark}");
        let remark = choose(None, &granted(machine(4, 1), 500), 1).remark;
        assert!(remark.expect("a remark").contains("so 1 thread will"));
    }

    #[test]
    fn fewer_threads_than_cores_are_pinned_to_none() {
        assert_eq!(told(Some(3), &machine(8, 1), 1), (3, "0-7".into()));
        assert_eq!(told(Some(1), &machine(8, 2), 2), (1, "0-3 4-7".into()));
    }

    #[test]
    fn more_threads_than_processors_are_refused() {
        for (asked, shards, says) in [
            (
                5,
                1,
                "--num-threads 5 for each of 1 model process makes 5, and this process may run on 4 processors; pass 4 or less",
            ),
            (
                2,
                3,
                "makes 6, and this process may run on 4 processors; pass 1 or less",
            ),
            (2, 8, "pass 1 or less"),
        ] {
            let place = Place::Cpu { shards };
            let failure =
                Threads::choose(Some(asked), &machine(2, 2), &place).expect_err("too many");
            assert_eq!(failure.code, Code::Config);
            assert!(failure.message.contains(says), "{failure}");
        }
    }

    #[test]
    fn a_process_with_a_gpu_is_kept_to_no_processors() {
        let place = Place::Cuda(vec![Gpu::default(); 2]);
        let threads = Threads::choose(None, &machine(16, 1), &place).expect("threads");
        assert_eq!((threads.count, threads.of_rank(1)), (8, &[][..]));
    }
}
