//! What `--env` prints: the facts one is asked for in a bug report.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::args::Environment;
use crate::machine::{GPU_QUERY, Machine};
use crate::plan::size;

/// How long the GPU's driver may take to answer.
const GPU_TIME: Duration = Duration::from_secs(5);

/// Version, processor, memory and devices.
pub fn render(machine: &Machine) -> String {
    let system = std::fs::read_to_string("/proc/version").unwrap_or_default();
    let mut lines = vec![
        format!("kv.run     {}", env!("CARGO_PKG_VERSION")),
        format!(
            "system     {}",
            system.split(" (").next().unwrap_or_default().trim()
        ),
        format!(
            "processor  {}, {}",
            machine.processor,
            machine.processors.describe()
        ),
        format!(
            "memory     {}, {} available",
            size(machine.memory_total),
            size(machine.memory_available)
        ),
    ];
    lines.extend(
        machine
            .gpus
            .iter()
            .map(|gpu| format!("GPU        {}, {}", gpu.name, size(gpu.memory_total))),
    );
    lines.join("\n") + "\n"
}

/// This machine, with those of its GPUs that this process may use.
pub fn machine(environment: &Environment) -> Machine {
    let visible = environment.get("CUDA_VISIBLE_DEVICES");
    Machine::read(&gpus(), visible.as_deref())
}

/// The answer to [`GPU_QUERY`]; empty where there is no driver, or where it does not answer in time.
fn gpus() -> String {
    let (program, args) = GPU_QUERY;
    let query = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut query) = query else {
        return String::new();
    };
    let until = Instant::now() + GPU_TIME;
    while let Ok(None) = query.try_wait() {
        if Instant::now() > until {
            let _gone = query.kill();
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let output = query
        .wait_with_output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    String::from_utf8_lossy(&output).into_owned()
}
