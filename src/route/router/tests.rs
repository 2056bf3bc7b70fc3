//! What a router keeps of engines that come and go.

use std::collections::BTreeSet;
use std::sync::Weak;

use super::super::engine::Told;
use super::super::upstream::UpstreamOptions;
use super::*;
use crate::answer::Usage;
use crate::metrics::MetricSources;
use crate::outcome::Outcome;

const MANY: usize = 1000;

fn router() -> Arc<Router> {
    let setup = Setup::new(Mode::Approximate, Policy::RoundRobin);
    let upstream = Upstream::open(&UpstreamOptions::default()).expect("no files");
    Router::new(Arc::default(), upstream, setup)
}

fn spec(number: usize) -> Spec {
    kvcellar_discovery::parse(&format!("url=http://10.0.0.1:{},name=e{number}", number + 1)).expect("an engine")
}

/// Every engine has answered a scrape.
fn are_well(router: &Router) {
    for engine in router.engines.all().iter() {
        engine.heard(Told::default());
    }
}

fn request(number: usize) -> Request {
    let body = format!(r#"{{"model": "m", "prompt": "{}"}}"#, format!("{number} ").repeat(400));
    let mut request = Request::read(Kind::Completion, body.into()).expect("a request");
    request.session = Some(format!("session {number}"));
    request
}

/// Values of the label `engine` in a router's metrics.
fn engines_in(text: &str) -> BTreeSet<&str> {
    text.lines().filter_map(|line| line.split_once("engine=\"")?.1.split('"').next()).collect()
}

fn metrics(router: &Router) -> String {
    let engines = &router.engines;
    router.metrics.text(&MetricSources { engines, fleet: None, gate: None, peers: None }).expect("text")
}

/// Lines about an engine that stay as they are while nothing happens to it.
fn counted(text: &str, engine: &str) -> Vec<String> {
    let of_engine = format!("engine=\"{engine}\"");
    text.lines().filter(|line| line.contains(&of_engine) && line.contains("_total")).map(str::to_owned).collect()
}

#[tokio::test]
async fn of_a_thousand_engines_that_left_nothing_stays() {
    let router = router();
    router.set_engines((0..=MANY).map(spec).collect());
    are_well(&router);
    let mut last = None;
    for number in 0..2 * (MANY + 1) {
        let ticket = router.route(&request(number)).await.expect("it goes somewhere");
        if number == 2 * MANY + 1 {
            last = Some(ticket);
        } else {
            ticket.end(Outcome::Done, Some(Usage { prompt: 100, cached: Some(0) }));
        }
    }
    let before = metrics(&router);
    assert_eq!(engines_in(&before).len(), MANY + 1);
    assert_eq!(router.sessions.last(usize::MAX).len(), 2 * (MANY + 1));
    let stays = counted(&before, "e0");
    assert!(
        stays.iter().any(|line| line.starts_with("kvcellar_route_decisions_total") && line.ends_with(" 2")),
        "{stays:?}"
    );
    let known: Vec<Weak<Engine>> = router.engines.all().iter().map(Arc::downgrade).collect();

    router.set_engines(vec![spec(0)]);
    let after = metrics(&router);
    assert_eq!(engines_in(&after), BTreeSet::from(["e0"]));
    assert_eq!(counted(&after, "e0"), stays, "the others' leaving changes nothing of it");
    assert_eq!(router.sessions.last(usize::MAX).len(), 2, "those of the engine that stayed");
    let alive = || known.iter().filter(|engine| engine.strong_count() > 0).count();
    assert!(alive() > 1, "a request that goes on keeps those that might have taken it");
    drop(last);
    assert_eq!(alive(), 1, "with books, speed, breaker, counts and what it was guessed to hold");
    assert_eq!(engines_in(&metrics(&router)), BTreeSet::from(["e0"]), "a request's late end makes no series");
}

#[tokio::test]
async fn an_engine_that_comes_back_begins_anew() {
    let router = router();
    router.set_engines(vec![spec(1)]);
    are_well(&router);
    drop(router.route(&request(1)).await.expect("it goes somewhere"));
    assert!(metrics(&router).contains(r#"outcomes_total{engine="e1",outcome="aborted"} 1"#));
    router.set_engines(Vec::new());
    router.set_engines(vec![spec(1)]);
    let text = metrics(&router);
    assert!(counted(&text, "e1").is_empty(), "{text}");
    assert!(text.contains(r#"kvcellar_route_engine_usable{engine="e1"} 0"#), "not seen yet");
}

#[tokio::test]
async fn metrics_are_whole_for_each_of_several_readers() {
    let router = router();
    router.set_engines((0..20).map(spec).collect());
    for engine in router.engines.all().iter() {
        engine.tally.decided(PrefixSource::Guess);
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let text = metrics(&router);
                    let ones = text
                        .lines()
                        .filter(|it| it.starts_with("kvcellar_route_decisions_total") && it.ends_with(" 1"));
                    assert_eq!(ones.count(), 20);
                }
            });
        }
    });
}
