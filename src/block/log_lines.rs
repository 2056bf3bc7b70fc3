//! Which log lines are ours. All crates log through the `log` facade; the command and the extension
//! each have a sink, and what dependencies say is nobody's business there.

/// Whether a line with this target comes from one of our crates.
pub fn are_ours(target: &str) -> bool {
    let krate = target.split("::").next().unwrap_or_default();
    krate == "kvcellar" || krate == "_native" || krate.starts_with("kvcellar_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_told_from_our_crates() {
        for ours in ["kvcellar", "kvcellar_engine::tier::spill", "kvcellar_route", "_native::worker"] {
            assert!(are_ours(ours), "{ours}");
        }
        for other in ["hyper::client", "kvcellars::it", "", "native::worker"] {
            assert!(!are_ours(other), "{other}");
        }
    }
}
