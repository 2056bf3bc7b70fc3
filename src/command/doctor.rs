//! `kvcellar doctor`: whether this machine suits KV Cellar, line by line, each problem with its
//! remedy. Changes nothing and leaves nothing behind.

pub mod cuda;
pub mod disk;
pub mod finding;
pub mod machine;

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use self::finding::{Finding, Status};

/// What to look at.
#[derive(Debug, Clone, Args)]
pub struct DoctorOptions {
    /// The directory meant as `nvme_dir`. Without it nothing is said of a disk.
    pub dir: Option<PathBuf>,
    /// Shared-memory directory for the pools.
    #[arg(long, default_value = "/dev/shm")]
    pub pool_dir: PathBuf,
    /// JSON on standard output.
    #[arg(long)]
    pub json: bool,
    /// Files that may be NVRTC, which Python found.
    #[arg(long, hide = true)]
    pub nvrtc: Vec<PathBuf>,
    /// The version of vLLM that Python found.
    #[arg(long, hide = true)]
    pub vllm: Option<String>,
    /// Why that version is a problem.
    #[arg(long, hide = true)]
    pub vllm_problem: Option<String>,
    /// Python found no vLLM; what an engine would need.
    #[arg(long, hide = true)]
    pub vllm_missing: Option<String>,
}

fn vllm(options: &DoctorOptions) -> Finding {
    let name = "vllm";
    match (&options.vllm, &options.vllm_problem) {
        (found, Some(problem)) => {
            Finding::new(Status::Problem, name, found.as_deref().unwrap_or("not installed"), problem.as_str())
        }
        (Some(version), None) => Finding::ok(name, version.as_str()),
        // Index and router run on hosts without engines.
        (None, None) if options.vllm_missing.is_some() => Finding::new(
            Status::Warning,
            name,
            "not installed: right where only the index or the router runs",
            options.vllm_missing.clone().unwrap_or_default(),
        ),
        (None, None) => {
            Finding::new(Status::Warning, name, "not looked at", "Run `python -m kvcellar doctor`, which asks Python")
        }
    }
}

/// Everything that can be found out.
pub fn examine(options: &DoctorOptions) -> Vec<Finding> {
    let mut findings = machine::examine(&options.pool_dir);
    if let Some(dir) = &options.dir {
        findings.extend(disk::examine(dir));
    }
    findings.extend(cuda::examine(&options.nvrtc));
    findings.push(vllm(options));
    findings
}

/// Prints the findings. Exit code 1 when one is a problem.
pub fn run(options: &DoctorOptions) -> i32 {
    let findings = examine(options);
    let worst = findings.iter().map(|finding| finding.status).max().unwrap_or(Status::Ok);
    if options.json {
        println!("{:#}", json!({ "worst": worst, "findings": findings }));
    } else {
        for Finding { status, name, found, remedy } in &findings {
            println!("{:<8} {name:<16} {found}", status.name());
            if let Some(remedy) = remedy {
                println!("{:<25} -> {remedy}", "");
            }
        }
    }
    i32::from(worst == Status::Problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DoctorOptions {
        DoctorOptions {
            dir: None,
            pool_dir: PathBuf::from("/dev/shm"),
            json: false,
            nvrtc: Vec::new(),
            vllm: None,
            vllm_problem: None,
            vllm_missing: None,
        }
    }

    #[test]
    fn vllm_is_judged_by_what_python_says() {
        assert_eq!(vllm(&options()).status, Status::Warning);
        let found = DoctorOptions { vllm: Some("0.32.0".to_owned()), ..options() };
        assert_eq!(vllm(&found).status, Status::Ok);
        let missing = DoctorOptions { vllm_missing: Some("Install it".to_owned()), ..options() };
        assert_eq!((vllm(&missing).status, vllm(&missing).remedy.as_deref()), (Status::Warning, Some("Install it")));
        let bad = DoctorOptions { vllm_problem: Some("too old".to_owned()), ..found };
        assert_eq!((vllm(&bad).status, vllm(&bad).remedy.as_deref()), (Status::Problem, Some("too old")));
    }

    #[test]
    fn every_finding_that_is_not_well_has_a_remedy() {
        let missing = DoctorOptions { dir: Some(PathBuf::from("/nonexistent/kvcellar")), ..options() };
        let findings = examine(&missing);
        assert!(findings.iter().all(|finding| (finding.status == Status::Ok) == finding.remedy.is_none()));
        let dir = findings.iter().find(|finding| finding.name == "nvme_dir").expect("a line about the directory");
        assert_eq!(dir.status, Status::Problem);
        assert_eq!(run(&missing), 1);
    }

    #[test]
    fn a_good_directory_is_left_as_it_was() {
        let binary = std::env::current_exe().expect("a binary");
        let dir = tempfile::tempdir_in(binary.parent().expect("a directory")).expect("a directory");
        let findings = disk::examine(dir.path());
        assert!(findings.len() >= 3, "{findings:?}");
        assert!(findings.iter().all(|finding| finding.status != Status::Problem), "{findings:?}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn memory_is_no_disk_and_a_file_no_directory() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let worst = |path: &std::path::Path| disk::examine(path).into_iter().map(|finding| finding.status).max();
        assert_eq!(worst(dir.path()), Some(Status::Warning));
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("writable");
        assert_eq!(worst(&file), Some(Status::Problem));
    }
}
