package quotaprom_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v2"

	"github.com/fleetquota/fleetquota/observe/quotaprom"
)

var (
	quoted   = regexp.MustCompile(`fqName: "(\w+)".*variableLabels: \{([^}]*)\}`)
	named    = regexp.MustCompile(`fleetquota_\w+`)
	selector = regexp.MustCompile(`(fleetquota_\w+)\{([^}]*)\}`)
	label    = regexp.MustCompile(`(\w+)(?:=~|!~|!=|=)`)
)

// registeredNames returns the labels of each metric that is registered, by the names that its samples have.
func registeredNames(t *testing.T) map[string]string {
	t.Helper()
	m := quotaprom.New(nil)
	descs := make(chan *prometheus.Desc, 1000)
	m.Describe(descs)
	close(descs)
	names := map[string]string{}
	for d := range descs {
		match := quoted.FindStringSubmatch(d.String())
		if match == nil {
			t.Fatalf("description: got %s, want one with a name", d)
		}
		for _, suffix := range []string{"", "_bucket", "_sum", "_count"} {
			if suffix == "" || histograms[match[1]] {
				names[match[1]+suffix] = match[2] + ",job,instance,le"
			}
		}
	}
	return names
}

var histograms = map[string]bool{
	"fleetquota_decision_duration_seconds": true, "fleetquota_utilization_ratio": true, "fleetquota_denial_retry_after_seconds": true,
	"fleetquota_wait_duration_seconds": true,
}

// checkNames fails if an expression names a metric or a label that is not registered.
func checkNames(t *testing.T, where, expr string, names map[string]string) {
	t.Helper()
	for _, name := range named.FindAllString(expr, -1) {
		if _, known := names[name]; !known {
			t.Errorf("%s: metric %s is not registered, in %s", where, name, expr)
		}
	}
	for _, s := range selector.FindAllStringSubmatch(expr, -1) {
		for _, l := range label.FindAllStringSubmatch(s[2], -1) {
			if !strings.Contains(","+names[s[1]]+",", ","+l[1]+",") {
				t.Errorf("%s: %s has no label %s, but %s, in %s", where, s[1], l[1], names[s[1]], expr)
			}
		}
	}
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(expr, pair[:1]) != strings.Count(expr, pair[1:]) {
			t.Errorf("%s: %s has not as many %s as %s", where, expr, pair[:1], pair[1:])
		}
	}
}

// TestDashboard: the dashboard is valid JSON, and each metric that it names is registered.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("../grafana/fleetquota.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		SchemaVersion int
		Panels        []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query any
			}
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	names, n := registeredNames(t), 0
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			n++
			checkNames(t, "panel "+p.Title, target.Expr, names)
		}
	}
	if dashboard.SchemaVersion < 39 || n < 30 {
		t.Errorf("dashboard: got schema %d with %d expressions, want 39 or later with 30 at least", dashboard.SchemaVersion, n)
	}
	for _, name := range named.FindAllString(string(text), -1) {
		if _, known := names[name]; !known {
			t.Errorf("the dashboard names %s, which is not registered", name)
		}
	}
}

// TestAlerts: the rules are valid YAML of the form that Prometheus reads, and each metric that they name is registered.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile("../grafana/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalStrict(text, &file); err != nil {
		t.Fatal(err)
	}
	names, n := registeredNames(t), 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			n++
			if checkNames(t, r.Alert, r.Expr, names); r.Alert == "" || !named.MatchString(r.Expr) || r.Annotations["summary"] == "" || r.Labels["severity"] == "" {
				t.Errorf("rule %d: got %+v, want a name, an expression, a severity and a summary", n, r)
			}
		}
	}
	if n < 10 {
		t.Errorf("rules: got %d, want 10 at least", n)
	}
}

// TestDocs: docs/metrics.md has each metric that is registered, and no other; docs/operating.md names no other.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, name := range named.FindAllString(string(text), -1) {
		documented[name] = true
	}
	names := registeredNames(t)
	for name := range names {
		if base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_sum"), "_count"); !documented[base] {
			t.Errorf("docs/metrics.md lacks %s", name)
		}
	}
	operating, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range named.FindAllString(string(text)+string(operating), -1) {
		if _, known := names[name]; !known {
			t.Errorf("the documents name %s, which is not registered", name)
		}
	}
}

// TestOperating: each metric that docs/operating.md names is registered.
func TestOperating(t *testing.T) {
	text, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	names := registeredNames(t)
	found := named.FindAllString(string(text), -1)
	if len(found) < 12 {
		t.Errorf("docs/operating.md: got the metrics %v, want 12 or more", found)
	}
	for _, name := range found {
		if _, known := names[name]; !known {
			t.Errorf("docs/operating.md: metric %s is not registered", name)
		}
	}
}

// TestPromtool: Prometheus' own tool accepts the alert rules, and each rule fires in the test of rules where it should, and only there.
func TestPromtool(t *testing.T) {
	tests, err := os.ReadFile("../grafana/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := os.ReadFile("../grafana/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, alert := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		if !strings.Contains(string(tests), `alertname="`+alert[1]+`",alertstate="firing"`) {
			t.Errorf("alerts_test.yaml: got no test in which %s fires, want one of each alert", alert[1])
		}
	}
	checkNames(t, "alerts_test.yaml", string(tests), registeredNames(t))
	tool, err := exec.LookPath("promtool")
	if err != nil {
		const text = "SKIPPED: THE ALERT RULES WERE NOT CHECKED BY PROMETHEUS: there is no promtool, such as that of Debian's package prometheus"
		if os.Getenv("FLEETQUOTA_REQUIRE_PROMTOOL") != "" {
			t.Fatal(text)
		}
		t.Skip(text)
	}
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		command := exec.CommandContext(t.Context(), tool, args...)
		command.Dir = "../grafana"
		if out, err := command.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: got %v, want success:\n%s", strings.Join(args, " "), err, out)
		}
	}
}
