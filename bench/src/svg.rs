//! A plot over the number of slivers: memory of each and time to create one, as one SVG file without any script or font of its own.

use std::fmt::Write as _;

use crate::figures::Density;

const WIDTH: f64 = 860.0;
const PANEL: f64 = 260.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 46.0;
const GAP: f64 = 74.0;
/// Lines across a panel.
const STEPS: u32 = 4;

/// A curve to draw.
struct Panel<'a> {
    title: &'a str,
    /// Slivers and value.
    points: Vec<(f64, f64)>,
    /// A line across, and what it is.
    bound: Option<(f64, &'a str)>,
}

/// Draws a run.
pub fn density(run: &Density, place: &str) -> String {
    let each = |kib: i64, slivers: u32| kib as f64 / 1024.0 / f64::from(slivers.max(1));
    let points = |value: &dyn Fn(&crate::figures::Point) -> f64| {
        run.curve.iter().map(|p| (f64::from(p.slivers), value(p))).collect::<Vec<_>>()
    };
    let panels = [
        Panel {
            title: "memory of the node per sliver, all in, MiB",
            points: points(&|p| each(p.fall_kib, p.slivers)),
            bound: Some((4.0, "must")),
        },
        Panel {
            title: "create to ready, ms (median since the last point)",
            points: points(&|p| p.create_us as f64 / 1000.0),
            bound: None,
        },
    ];
    let height = TOP + panels.len() as f64 * (PANEL + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
        escape(&format!("{} slivers, {place}", run.slivers))
    );
    for (n, panel) in panels.iter().enumerate() {
        draw(&mut svg, panel, TOP + 24.0 + n as f64 * (PANEL + GAP));
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, panel: &Panel<'_>, top: f64) {
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let right = most(&mut panel.points.iter().map(|p| p.0)).max(1.0);
    let values = panel.points.iter().map(|p| p.1);
    let high = nice(most(&mut values.chain(panel.bound.map(|b| b.0))));
    let x = |slivers: f64| LEFT + slivers / right * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| top + PANEL - value.max(0.0) / high * PANEL;
    // To a String nothing fails.
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\">{}</text>", top - 8.0, escape(panel.title));
    for step in 0..=STEPS {
        let part = f64::from(step) / f64::from(STEPS);
        let (line, at) = (y(high * part), x(right * part));
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {line:.1}H{}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555\">{}</text>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{:.0}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            line + 4.0,
            tick(high * part),
            top + PANEL + 18.0,
            right * part,
        );
    }
    if let Some((bound, name)) = panel.bound {
        let line = y(bound);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {line:.1}H{}\" stroke=\"#c33\" stroke-dasharray=\"6 4\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#c33\">{}</text>",
            WIDTH - RIGHT,
            WIDTH - RIGHT - 4.0,
            line - 5.0,
            escape(name),
        );
    }
    let line: Vec<String> = panel.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#1667b7\" stroke-width=\"2\"/>",
        line.join(" ")
    );
    for (slivers, value) in &panel.points {
        let _ = writeln!(
            svg,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"#1667b7\"><title>{slivers:.0}: {value:.2}</title></circle>",
            x(*slivers),
            y(*value),
        );
    }
}

/// The next of 1, 2, 5, 10, 20 … that is not below.
fn nice(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|n| *n >= value).unwrap_or(value)
}

fn tick(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Point;

    #[test]
    fn every_point_is_drawn_inside() {
        let curve = [(100, 102_400), (200, 409_600)];
        let point = |(slivers, fall_kib)| Point { slivers, fall_kib, create_us: 70_000 };
        let json = serde_json::json!({
            "slivers": 200, "answering": 200, "cloned": true, "guest_mib": 64, "node": { "before": {}, "after": {} },
            "sliver": { "guest_kib": 0.0, "vmm_kib": 0.0, "threads": 0.0 }, "template_kib": 0, "disk_bytes": 0,
            "create_us": [], "turns": { "clone_us": [], "cold_us": [] },
            "idle": { "window_us": 0, "wakeups": 0.0, "switches": 0.0, "cpu_permille": 0.0 },
            "curve": curve.map(point), "peer": null, "program": null,
        });
        let svg = density(&serde_json::from_value(json).unwrap(), "on <this> & that");
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(svg.contains("on &lt;this&gt; &amp; that") && svg.contains("200: 2.00"));
        for number in svg.split("cy=\"").skip(1).filter_map(|s| s.split('"').next()?.parse::<f64>().ok()) {
            assert!((0.0..TOP + 2.0 * (PANEL + GAP)).contains(&number), "{number}");
        }
    }

    #[test]
    fn scales_end_on_round_numbers() {
        assert_eq!([0.0, 0.3, 1.0, 4.2, 9.0, 66.0].map(nice), [1.0, 0.5, 1.0, 5.0, 10.0, 100.0]);
    }
}
