//! What this process uses of the machine, as the system tells it. Where it does not, nothing is shown.

use crate::cli::human_bytes;
use std::time::Instant;

/// Processor and memory of this process.
pub(super) struct Usage {
    cores: usize,
    /// Cores kept busy since the last look.
    busy: Option<f64>,
    resident_bytes: Option<u64>,
    total_bytes: Option<u64>,
    last: Option<(Instant, f64)>,
}

impl Usage {
    pub(super) fn new(cores: usize) -> Usage {
        Usage {
            cores,
            busy: None,
            resident_bytes: None,
            total_bytes: total_bytes(),
            last: None,
        }
    }

    #[cfg(test)]
    pub(super) fn known(busy: f64, resident: u64, total: Option<u64>, cores: usize) -> Usage {
        Usage {
            cores,
            busy: Some(busy),
            resident_bytes: Some(resident),
            total_bytes: total,
            last: None,
        }
    }

    /// Looks again, at most once a second.
    pub(super) fn look(&mut self) {
        let now = Instant::now();
        let before = self.last;
        if before.is_some_and(|(at, _)| now.duration_since(at).as_secs_f64() < 1.0) {
            return;
        }
        self.resident_bytes = resident_bytes();
        let Some(secs) = cpu_secs() else { return };
        self.busy = before.map(|(at, was)| (secs - was) / now.duration_since(at).as_secs_f64());
        self.last = Some((now, secs));
    }

    /// `cpu 1.9 of 2 cores, 310 MiB of 24 GiB`.
    pub(super) fn text(&self) -> String {
        let mut parts = Vec::new();
        if let Some(busy) = self.busy {
            parts.push(format!("cpu {busy:.1} of {} cores", self.cores));
        }
        if let Some(bytes) = self.resident_bytes {
            let total = self.total_bytes.map(|t| format!(" of {}", human_bytes(t)));
            parts.push(format!(
                "{}{}",
                human_bytes(bytes),
                total.unwrap_or_default()
            ));
        }
        parts.join(", ")
    }
}

/// Processor time of this process, user and system (proc_pid_stat(5), fields 14 and 15).
#[cfg(target_os = "linux")]
fn cpu_secs() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the name in brackets and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(target_os = "linux")]
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(target_os = "linux")]
fn total_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(not(target_os = "linux"))]
fn cpu_secs() -> Option<f64> {
    None
}

#[cfg(not(target_os = "linux"))]
fn resident_bytes() -> Option<u64> {
    None
}

#[cfg(not(target_os = "linux"))]
fn total_bytes() -> Option<u64> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_system_tells() {
        assert!(cpu_secs().unwrap() >= 0.0);
        assert!(resident_bytes().unwrap() > 1 << 20);
        assert!(total_bytes().unwrap() > resident_bytes().unwrap());
        let mut usage = Usage::new(2);
        usage.look();
        assert!(usage.text().contains("iB of "), "{}", usage.text());
    }
}
