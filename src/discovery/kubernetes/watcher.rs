//! Holds the watches of a cluster, and what they have shown.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::{BoxStream, SelectAll, select_all};
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Config, ResourceExt};
use tokio::sync::watch;

use super::engine_pod::EnginePod;
use super::listed::Listed;
use super::objectives::{self, objectives};
use super::pod_status::pods;
use super::pools::{InferencePool, pool, pools};
use super::troubles::{Troubles, Watched};
use super::{ClusterOptions, ClusterState};
use crate::limits::{OBJECTIVES_MAX, PODS_MAX};
use kvcellar_block::error::{Error, Result};

/// What a watch brings.
type WatchEvent = watcher::Result<watcher::Event<DynamicObject>>;
type Events = BoxStream<'static, WatchEvent>;

/// Holds the watches, and what they have shown.
pub(super) struct Watcher {
    client: Client,
    /// The pool's name.
    pool_name: Option<String>,
    /// The pods that are watched. `None`: not known yet.
    selector: Option<String>,
    pool_events: Option<Events>,
    pod_events: Option<Events>,
    objective_events: SelectAll<BoxStream<'static, (usize, WatchEvent)>>,
    pool: Listed<InferencePool>,
    pods: Listed<EnginePod>,
    objectives: [Listed<i32>; objectives::GROUPS.len()],
    pools_watched: Watched,
    pods_watched: Watched,
    objectives_watched: [Watched; objectives::GROUPS.len()],
    troubles: Troubles,
    /// It was said that there is no pool.
    is_missing: bool,
}

/// What one event of a watch has brought.
enum Effect {
    Nothing,
    Changed,
    /// Engines cannot be known until it is over.
    Trouble(Box<(Watched, Error)>),
}

impl Effect {
    fn of(has_changed: bool) -> Self {
        if has_changed { Self::Changed } else { Self::Nothing }
    }
}

impl Watcher {
    pub(super) fn new(options: &ClusterOptions, config: Config, with_objectives: bool) -> Result<Self> {
        let namespace = options.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| {
            Error::config(options.flag(), format!("no access to a Kubernetes API: {error}"), "Look at KUBECONFIG")
        })?;
        let watched = |kind: ApiResource| Watched { kind, namespace: namespace.clone(), flag: options.flag() };
        let pools_watched = watched(pools());
        let objectives_watched = objectives::GROUPS.map(|group| watched(objectives(group)));
        let mut made = Self {
            pool_name: options.inference_pool.clone(),
            selector: None,
            pool_events: None,
            pod_events: None,
            objective_events: SelectAll::new(),
            pool: Listed::new("InferencePool", 1),
            pods: Listed::new("pod", PODS_MAX),
            objectives: [(); objectives::GROUPS.len()].map(|()| Listed::new("InferenceObjective", OBJECTIVES_MAX)),
            pods_watched: watched(pods()),
            pools_watched,
            objectives_watched,
            client,
            troubles: Troubles::default(),
            is_missing: false,
        };
        if let Some(name) = &options.inference_pool {
            let alone = watcher::Config::default().fields(&format!("metadata.name={name}"));
            made.pool_events = Some(made.events(&made.pools_watched, alone));
        }
        if options.inference_pool.is_some() && with_objectives {
            let all = made.objectives_watched.iter().enumerate();
            let streams = all.map(|(at, watched)| {
                let events = made.events(watched, watcher::Config::default());
                events.map(move |event| (at, event)).boxed()
            });
            made.objective_events = select_all(streams.collect::<Vec<_>>());
        }
        if let Some(labels) = &options.labels {
            made.select(Some(labels.clone()));
        }
        Ok(made)
    }

    fn events(&self, watched: &Watched, config: watcher::Config) -> Events {
        let api = Api::namespaced_with(self.client.clone(), &watched.namespace, &watched.kind);
        watcher(api, config).default_backoff().boxed()
    }

    /// Watches other pods from now on. Those known before stay until the others are listed.
    fn select(&mut self, selector: Option<String>) {
        if self.selector == selector {
            return;
        }
        let events = |labels| self.events(&self.pods_watched, watcher::Config::default().labels(labels));
        self.pod_events = selector.as_deref().map(events);
        if selector.is_none() {
            self.pods = Listed::new("pod", PODS_MAX);
        }
        self.selector = selector;
    }

    fn is_known(&self) -> bool {
        let without_pool = self.pool_events.is_some() && self.pool.is_complete() && self.pool.known().is_empty();
        without_pool || self.pods.is_complete()
    }

    pub(super) fn state(&self) -> ClusterState {
        // The extension's own objectives come first, and win.
        let objectives = self.objectives.iter().rev().flat_map(|listed| listed.known().clone()).collect();
        ClusterState {
            pods: Arc::new(self.pods.known().clone()),
            target_ports: self.pool.known().values().next().map(|pool| pool.target_ports.clone()),
            objectives: Arc::new(objectives),
        }
    }

    /// # Errors
    /// The first trouble that keeps engines from being known.
    pub(super) async fn until_known(&mut self) -> Result<()> {
        while !self.is_known() {
            if let Effect::Trouble(trouble) = self.step().await {
                return Err(trouble.1);
            }
        }
        Ok(())
    }

    pub(super) async fn keep(mut self, state: watch::Sender<ClusterState>) {
        loop {
            match self.step().await {
                Effect::Changed => drop(state.send_replace(self.state())),
                Effect::Trouble(trouble) => {
                    self.troubles.on_trouble(&trouble.0, &trouble.1);
                }
                Effect::Nothing => {}
            }
        }
    }

    /// Takes in the next event.
    async fn step(&mut self) -> Effect {
        tokio::select! {
            event = next(&mut self.pool_events) => self.on_pool(event),
            event = next(&mut self.pod_events) => self.on_pod(event),
            Some((at, event)) = self.objective_events.next() => self.on_objective(at, event),
        }
    }

    fn on_pool(&mut self, event: WatchEvent) -> Effect {
        let event = match passed(&mut self.troubles, &self.pools_watched, event) {
            Ok(event) => event,
            Err(step) => return step,
        };
        let is_listed = matches!(event, watcher::Event::InitDone);
        let has_changed = self.pool.on_event(event, DynamicObject::name_any, |object, _| pool(object).map(Some));
        if !has_changed && !is_listed {
            return Effect::Nothing;
        }
        let selector = self.pool.known().values().next().map(|pool| pool.selector.clone());
        if selector.is_none() && self.pool.is_complete() && !self.is_missing {
            let (name, namespace) = (self.pool_name.as_deref().unwrap_or_default(), &self.pools_watched.namespace);
            log::warn!("there is no InferencePool {name} in the namespace {namespace}: no engines until there is one");
        }
        self.is_missing = selector.is_none();
        self.select(selector);
        Effect::Changed
    }

    fn on_pod(&mut self, event: WatchEvent) -> Effect {
        let event = match passed(&mut self.troubles, &self.pods_watched, event) {
            Ok(event) => event,
            Err(step) => return step,
        };
        Effect::of(self.pods.on_event(event, DynamicObject::name_any, EnginePod::read))
    }

    fn on_objective(&mut self, at: usize, event: WatchEvent) -> Effect {
        let watched = &self.objectives_watched[at];
        if event.as_ref().is_err_and(Watched::is_absent) {
            // One of the groups is usual; and without any there are the router's flags.
            return Effect::Nothing;
        }
        let event = match passed(&mut self.troubles, watched, event) {
            Ok(event) => event,
            Err(Effect::Trouble(trouble)) => {
                // Requests go on without.
                self.troubles.on_trouble(watched, &trouble.1);
                return Effect::Nothing;
            }
            Err(step) => return step,
        };
        let pool = self.pool_name.as_deref().unwrap_or_default();
        let read = |object: &DynamicObject, _: Option<&i32>| objectives::priority(object, pool);
        Effect::of(self.objectives[at].on_event(event, DynamicObject::name_any, read))
    }
}

/// An event that a watch brings; never, where there is no watch.
async fn next(events: &mut Option<Events>) -> WatchEvent {
    match events {
        Some(events) => match events.next().await {
            Some(event) => event,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// The event, or what its absence means.
fn passed(
    troubles: &mut Troubles,
    watched: &Watched,
    event: WatchEvent,
) -> std::result::Result<watcher::Event<DynamicObject>, Effect> {
    match event {
        // A list has only been asked for.
        Ok(watcher::Event::Init) => Ok(watcher::Event::Init),
        Ok(event) => {
            troubles.on_event(watched);
            Ok(event)
        }
        Err(error) => Err(match watched.explain(&error) {
            Some(error) => Effect::Trouble(Box::new((watched.clone(), error))),
            None => Effect::Nothing,
        }),
    }
}
