//! What the user decides about the nvme tier.

use std::path::PathBuf;

use serde_json::Value;

use super::{absolute_path, boolean, size, wrong};
use kvcellar_block::error::{Error, Result};

/// How bytes get to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskEngine {
    /// `io_uring` where it is allowed, else threads.
    #[default]
    Auto,
    /// `io_uring`, or no tiers.
    IoUring,
    /// Threads with `pread` and `pwrite`.
    Threads,
}

/// Whether transfers pass through memory in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StagingChoice {
    /// Where the disk is faster that way, by a trial at the start.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never: the disk reads and writes the slots.
    Off,
}

/// When to load what lies on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadPolicy {
    /// Whenever it is there.
    #[default]
    Always,
    /// When it is predicted to be faster than computing.
    Auto,
    /// Never: only the dram tier is loaded.
    Never,
}

/// Which blocks are written to disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Admission {
    /// Every block: right as long as the disk is large and patient.
    #[default]
    All,
    /// While there is room every block, then only those that were used again: fewer writes, fewer
    /// hits.
    Reused,
}

/// Bytes that may be written in a time, as `2TB/day`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteRate {
    /// Bytes.
    pub bytes: u64,
    /// In so many seconds.
    pub seconds: u32,
}

impl WriteRate {
    /// Reads a size and a time with a slash between them.
    fn read(text: &str) -> Option<Self> {
        let (bytes, time) = text.split_once('/')?;
        let seconds = match time.trim() {
            "s" | "second" => 1,
            "m" | "minute" => 60,
            "h" | "hour" => 3_600,
            "d" | "day" => 86_400,
            _ => return None,
        };
        let bytes = size::parse("nvme_write_budget", &Value::from(bytes.trim())).ok()?;
        Some(Self { bytes, seconds })
    }
}

/// Configuration of the nvme tier. Without a directory there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeConfig {
    /// Directory on the disk.
    pub dir: Option<PathBuf>,
    /// Most bytes that all stores of this user below `dir` may take on disk together, everything
    /// included.
    pub bytes: u64,
    /// The user wrote the size; a default may be more than the disk has.
    pub bytes_explicit: bool,
    /// Bytes of the file system that stay free whatever happens; `None`: a twentieth of it, at most
    /// 10 GiB.
    pub reserve_bytes: Option<u64>,
    /// See [`DiskEngine`].
    pub engine: DiskEngine,
    /// See [`StagingChoice`].
    pub staging: StagingChoice,
    /// Write every block at once, not only the coldest.
    pub write_through: bool,
    /// See [`LoadPolicy`].
    pub load_policy: LoadPolicy,
    /// See [`Admission`].
    pub admission: Admission,
    /// Bytes that may be written in a time, whatever would be worth writing; `None`: no bound.
    pub write_budget: Option<WriteRate>,
    /// Share of the slots, in percent, kept free or clean.
    pub clean_percent: u64,
    /// Seconds after which a block is erased from disk.
    pub retention_s: Option<u64>,
}

/// Default size of the store: modest, so that a first start never fills a disk.
pub const NVME_BYTES_DEFAULT: u64 = 16 << 30;

/// Keys with the type a user must write, for messages.
pub(crate) const KEYS: &[(&str, &str)] = &[
    ("nvme_dir", "an absolute path"),
    ("nvme_size", "a size such as \"100GiB\" or a positive number of bytes"),
    ("nvme_reserve", "a size such as \"10GiB\", a number of bytes, or 0 to reserve nothing"),
    ("nvme_engine", "\"auto\", \"io_uring\" or \"threads\""),
    ("nvme_staging", "\"auto\", \"on\" or \"off\""),
    ("nvme_admission", "\"all\" or \"reused\""),
    ("nvme_write_budget", "a size and a time such as \"2TB/day\", of second, minute, hour or day"),
    ("write_through", "true or false"),
    ("clean_percent", "a whole number from 0 to 100"),
    ("load_policy", "\"always\", \"auto\" or \"never\""),
    ("retention", "a time such as \"24h\", \"30m\" or \"7d\""),
];

impl Default for NvmeConfig {
    fn default() -> Self {
        Self {
            dir: None,
            bytes: NVME_BYTES_DEFAULT,
            bytes_explicit: false,
            reserve_bytes: None,
            engine: DiskEngine::Auto,
            staging: StagingChoice::Auto,
            write_through: false,
            load_policy: LoadPolicy::Always,
            admission: Admission::All,
            write_budget: None,
            clean_percent: 50,
            retention_s: None,
        }
    }
}

impl NvmeConfig {
    /// Takes one key. `false`: it is not one of ours.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub(super) fn set(&mut self, key: &str, value: &Value) -> Result<bool> {
        let text = value.as_str();
        match key {
            "nvme_dir" => self.dir = Some(absolute_path(key, value)?),
            "nvme_size" => {
                self.bytes = size::parse(key, value)?;
                self.bytes_explicit = true;
            }
            "nvme_reserve" => self.reserve_bytes = Some(size::parse_or_zero(key, value)?),
            "nvme_engine" => {
                self.engine = match text {
                    Some("auto") => DiskEngine::Auto,
                    Some("io_uring") => DiskEngine::IoUring,
                    Some("threads") => DiskEngine::Threads,
                    _ => return Err(wrong(key, value)),
                }
            }
            "nvme_staging" => {
                self.staging = match text {
                    Some("auto") => StagingChoice::Auto,
                    Some("on") => StagingChoice::On,
                    Some("off") => StagingChoice::Off,
                    _ => return Err(wrong(key, value)),
                }
            }
            "nvme_admission" => {
                self.admission = match text {
                    Some("all") => Admission::All,
                    Some("reused") => Admission::Reused,
                    _ => return Err(wrong(key, value)),
                }
            }
            "nvme_write_budget" => {
                self.write_budget = Some(text.and_then(WriteRate::read).ok_or_else(|| wrong(key, value))?);
            }
            "write_through" => self.write_through = boolean(key, value)?,
            "clean_percent" => {
                self.clean_percent =
                    value.as_u64().filter(|percent| *percent <= 100).ok_or_else(|| wrong(key, value))?;
            }
            "load_policy" => {
                self.load_policy = match text {
                    Some("always") => LoadPolicy::Always,
                    Some("auto") => LoadPolicy::Auto,
                    Some("never") => LoadPolicy::Never,
                    _ => return Err(wrong(key, value)),
                }
            }
            "retention" => {
                self.retention_s = Some(text.and_then(seconds).ok_or_else(|| wrong(key, value))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Keys that say something about a tier that is not there are a mistake.
    ///
    /// # Errors
    /// [`Error::Config`] naming `nvme_dir`.
    pub(super) fn check(&self) -> Result<()> {
        let rest = Self { dir: None, ..self.clone() };
        if self.dir.is_none() && rest != Self::default() {
            return Err(Error::config(
                "nvme_dir",
                "is missing, but other keys of the nvme tier are set",
                "Write the directory on the disk, or remove those keys",
            ));
        }
        Ok(())
    }
}

/// Seconds of a time such as `90s`, `30m`, `24h` or `7d`.
pub(super) fn seconds(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    number.trim().parse::<u64>().ok()?.checked_mul(unit).filter(|seconds| *seconds > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_may_be_reserved() {
        let mut config = NvmeConfig::default();
        assert!(config.set("nvme_reserve", &Value::from(0)).is_ok_and(|known| known));
        assert_eq!(config.reserve_bytes, Some(0));
        assert!(
            config.set("nvme_reserve", &Value::from(-1)).is_err() && config.set("nvme_size", &Value::from(0)).is_err()
        );
    }

    #[test]
    fn write_budgets_have_a_size_and_a_time() {
        let rate = |bytes, seconds| Some(WriteRate { bytes, seconds });
        assert_eq!(WriteRate::read("2TB/day"), rate(2_000_000_000_000, 86_400));
        assert_eq!([WriteRate::read("1GiB / h"), WriteRate::read("5MB/s")], [rate(1 << 30, 3_600), rate(5_000_000, 1)]);
        assert_eq!(["2TB", "2TB/week", "0/day", "/day", "x/s", "-1GB/s"].map(WriteRate::read), [None; 6]);
    }

    #[test]
    fn times_have_units() {
        assert_eq!(seconds("24h"), Some(86_400));
        assert_eq!(seconds("90s"), Some(90));
        assert_eq!([seconds("0s"), seconds("24"), seconds("h"), seconds(""), seconds("-1d"), seconds("1é")], [None; 6]);
    }
}
