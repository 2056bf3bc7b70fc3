//! What goes wrong with the Kubernetes API, in words that name the remedy, and each trouble logged
//! once.

use std::collections::HashMap;
use std::error::Error as _;
use std::time::Instant;

use kube::api::ApiResource;
use kube::runtime::watcher;

use crate::limits::TROUBLE_AGAIN_AFTER;
use kvcellar_block::error::Error;

/// A kind of objects that is watched.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    /// The kind.
    pub(crate) kind: ApiResource,
    /// Where they are.
    pub(crate) namespace: String,
    /// The flag that asks for them.
    pub(crate) flag: &'static str,
}

impl Watched {
    /// As it stands in a `Role`, with its group.
    pub(crate) fn resource(&self) -> String {
        match self.kind.group.as_str() {
            "" => self.kind.plural.clone(),
            group => format!("{}.{group}", self.kind.plural),
        }
    }

    /// Why a watch does not go on, and what to do. `None`: it goes on, from a new list.
    pub(crate) fn explain(&self, error: &watcher::Error) -> Option<Error> {
        use watcher::Error as Watch;
        let (resource, namespace) = (self.resource(), &self.namespace);
        let (verb, cause) = match error {
            Watch::InitialListFailed(cause) => ("list", cause),
            Watch::WatchStartFailed(cause) | Watch::WatchFailed(cause) => ("watch", cause),
            Watch::WatchError(status) => {
                return (status.code != 410).then(|| self.later(&status.message));
            }
            Watch::NoResourceVersion => return Some(self.later("it names no versions of them")),
        };
        let kube::Error::Api(status) = cause else { return Some(self.later(&chain(cause))) };
        let (problem, remedy) = match status.code {
            410 => return None,
            403 => (
                format!("not allowed to {verb} {resource} in the namespace {namespace}: {}", status.message),
                format!(
                    "Give the service account a Role there with the verbs list and watch for {} in the apiGroup \"{}\"",
                    self.kind.plural, self.kind.group
                ),
            ),
            401 => (
                format!("the Kubernetes API does not accept our credentials: {}", status.message),
                "Mount a service account's token, or set KUBECONFIG".to_owned(),
            ),
            404 => (
                format!("the Kubernetes API has no {resource} of version {}", self.kind.version),
                "Install the definitions (CRDs) of the Gateway API inference extension".to_owned(),
            ),
            _ => return Some(self.later(&status.message)),
        };
        Some(Error::config(self.flag, problem, remedy))
    }

    fn later(&self, problem: &str) -> Error {
        Error::TryLater {
            what: format!("the Kubernetes API, asked for {},", self.resource()),
            holder: problem.to_owned(),
        }
    }

    /// The API server does not have this kind.
    pub(crate) fn is_absent(error: &watcher::Error) -> bool {
        matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
    }
}

/// An error with all its causes: its first line alone names none of them.
fn chain(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}

/// Troubles that were logged and are not over, by resource.
#[derive(Debug, Default)]
pub(crate) struct Troubles {
    logged: HashMap<String, (String, Instant)>,
}

impl Troubles {
    /// Logs a trouble, unless it was logged lately. `true`: it is logged now.
    pub(crate) fn on_trouble(&mut self, watched: &Watched, error: &Error) -> bool {
        let (resource, text) = (watched.resource(), error.to_string());
        let before = self.logged.get(&resource);
        // An API server that is away says so in changing words.
        let is_known = before.is_some_and(|(logged, at)| {
            at.elapsed() < TROUBLE_AGAIN_AFTER && (*logged == text || matches!(error, Error::TryLater { .. }))
        });
        if !is_known {
            log::warn!("{text}; what is known of {resource} stays");
            self.logged.insert(resource, (text, Instant::now()));
        }
        !is_known
    }

    /// A watch goes on.
    pub(crate) fn on_event(&mut self, watched: &Watched) {
        if self.logged.is_empty() {
            return;
        }
        let resource = watched.resource();
        if self.logged.remove(&resource).is_some() {
            log::info!("{resource} are watched again");
        }
    }
}
