package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

// report holds the content of all files that are written.
type report struct {
	machine machine
	results *results
	missed  []string
}

// machine describes the run that the figures come from.
type machine struct {
	date, cpu, system, goVersion, redis, postgres string
	modules                                       []string
	took                                          time.Duration
	counts                                        int
	size                                          size
}

func thisMachine(now time.Time) machine {
	m := machine{
		date:      now.UTC().Format(time.DateOnly),
		cpu:       fmt.Sprintf("%d processors", runtime.NumCPU()),
		system:    runtime.GOOS + "/" + runtime.GOARCH,
		goVersion: runtime.Version(),
	}
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			if name, value, _ := strings.Cut(s.Text(), ":"); strings.TrimSpace(name) == "model name" {
				m.cpu += ", " + strings.TrimSpace(value)
				break
			}
		}
	}
	peers := []string{"go-redis/", "redis/", "ulule/", "throttled/", "jackc/pgx/", "sethvargo/", "go-chi/", "x/time"}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if slices.ContainsFunc(peers, func(p string) bool { return strings.Contains(d.Path, p) }) {
				m.modules = append(m.modules, d.Path+" "+d.Version)
			}
		}
	}
	return m
}

func (m *machine) String() string {
	text := fmt.Sprintf("%s; %s, %s; %s", m.date, m.cpu, m.system, m.goVersion)
	if m.redis != "" {
		text += "; Redis " + m.redis
	}
	if m.postgres != "" {
		text += "; PostgreSQL " + m.postgres
	}
	return text
}

// view is how a section's tables look.
type view struct {
	section, title, note string
	lead                 metric // by which the subjects are compared
	columns              []metric
}

var views = []view{
	{"local", "Local", "One of 32 decisions is timed.",
		decisions, []metric{p50, p99, p999, allocs}},
	{"memory", "Local, memory", "Bytes beside the key's own text; the text is an object too. The time of a collection of the whole heap, most of which goes into scanning it, and of its pauses.",
		heapBytes, []metric{objects, collect, pause}},
	{"http", "HTTP middleware", "A request through the handler, limited by the client's address, in memory, without a connection. Each library writes its own fields.",
		decisions, []metric{p50, p99, p999, allocs}},
	{"redis", "Redis, one server", "Client and server share the processors.",
		decisions, []metric{p50, p99, p999, allocs, serverCPU}},
	{"redis memory", "Redis, memory", "used_memory has the server's tables in it, MEMORY USAGE has not.",
		usedBytes, []metric{keyBytes}},
	{"benchmark", "redis-benchmark", "50 connections, 16 commands on end on each.",
		decisions, []metric{serverCPU}},
	{"cluster", "Redis Cluster, three masters", "They share the processors too: this shows the cost of a cluster, and not its gain.",
		decisions, []metric{p50, p99, p999, allocs, serverCPU}},
	{"latency", "Latency at 70 % of each one's own peak", "Decisions are offered at a steady rate, answered or not, and latencies count from when a decision was due. The rate is kept to within about 0.1 ms.",
		p99, []metric{p50, p999, offered, decisions}},
	{"growth", "Growth", "",
		decisions, []metric{serverCPU, usedBytes, keyBytes}},
	{"postgres", "PostgreSQL", "Client and server share the processors, and a commit waits for the disk unless synchronous_commit is off. UPDATE … WHERE counts and gives nothing back. A pool has 16 connections.",
		decisions, []metric{p50, p99, p999, allocs}},
}

func viewOf(section string) *view {
	return &views[slices.IndexFunc(views, func(v view) bool { return v.section == section })]
}

func (w work) String() string {
	var parts []string
	if w.keys == 1 {
		parts = append(parts, "one key")
	} else {
		parts = append(parts, number(float64(w.keys))+" keys")
	}
	if w.denied {
		parts = append(parts, "denied")
	}
	if w.goroutines == 1 {
		parts = append(parts, "1 goroutine")
	} else if w.goroutines > 1 {
		parts = append(parts, fmt.Sprint(w.goroutines, " goroutines"))
	}
	return strings.Join(parts, ", ")
}

// title names the table among those of all sections.
func (w work) title() string { return viewOf(w.section).title + ": " + w.String() }

// more reports whether more of a metric is better.
func (m metric) more() bool { return m == decisions }

// ratio says how good a value is beside another: above 1 it is better.
func (m metric) ratio(value, other float64) float64 {
	if m.more() {
		return value / other
	}
	return other / value
}

// best returns the row of some kinds with the best median.
func (t *table) best(m metric, kinds ...kind) (best *row, value float64) {
	if t == nil {
		return nil, 0
	}
	for _, r := range t.rows {
		if v, _, _, ok := r.of(m); ok && slices.Contains(kinds, r.kind) && (best == nil || m.ratio(v, value) > 1) {
			best, value = r, v
		}
	}
	return best, value
}

// sorted returns the rows, the best first.
func (t *table) sorted(m metric) []*row {
	rows := slices.Clone(t.rows)
	slices.SortStableFunc(rows, func(a, b *row) int {
		va, _, _, oka := a.of(m)
		vb, _, _, okb := b.of(m)
		switch {
		case !oka || !okb:
			return boolInt(okb) - boolInt(oka)
		case m.ratio(va, vb) > 1:
			return -1
		case m.ratio(va, vb) < 1:
			return 1
		}
		return 0
	})
	return rows
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// number writes three significant digits.
func number(v float64) string {
	unit := ""
	switch abs := math.Abs(v); {
	case abs >= 999_500:
		v, unit = v/1e6, "M"
	case abs >= 9995:
		v, unit = v/1e3, "k"
	}
	switch abs := math.Abs(v); {
	case abs >= 99.95 || v == math.Trunc(v):
		return strconv.FormatFloat(v, 'f', 0, 64) + unit
	case abs >= 9.995:
		return strconv.FormatFloat(v, 'f', 1, 64) + unit
	default:
		return strconv.FormatFloat(v, 'f', 2, 64) + unit
	}
}

func times(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) + " ×" }

// markdown writes the report.
func (r *report) markdown() []byte {
	var b bytes.Buffer
	m := &r.machine
	fmt.Fprintf(&b, "# Results\n\nWritten by `go -C bench run .`, which does it again. Medians over %d counts.\n\n", m.counts)
	fmt.Fprintf(&b, "%s. It took %v.\n\n%s.\n", m, m.took.Round(time.Second), strings.Join(m.modules, ", "))
	if m.counts < 5 {
		b.WriteString("\n**Too short a run: the figures are useless.**\n")
	}
	for _, text := range r.missed {
		fmt.Fprintf(&b, "\nNot measured: %s.\n", text)
	}
	b.WriteString("\nRatios are above 1 where this library, or the subject of the line, is better.\n")
	b.WriteString("\nNot among the peers: rueidislimiter and mennanov/limiters, of which no released module can be had.\n")
	b.WriteString("ulule/limiter and httprate count in windows, which is less work than a bucket; ulule/limiter charges denials too.\nhttprate keeps a hash for a key and not its text: two keys may share a limit.\n")

	b.WriteString("\n## Targets\n\n| target | measured | verdict |\n|---|---|---|\n")
	for _, t := range targets {
		measured, ok, err := t.check(r)
		verdict := "**missed**"
		switch {
		case err != nil:
			measured, verdict = err.Error(), "not measured"
		case ok:
			verdict = "met"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", t.text, measured, verdict)
	}
	list, n, all := r.behind()
	fmt.Fprintf(&b, "\n## Where a peer is ahead\n\nA peer is ahead in %d of %d comparisons.\n%s", n, all, list)
	b.WriteString("\n## Charts\n")
	for _, c := range r.charts() {
		fmt.Fprintf(&b, "\n![%s](charts/%s.svg)\n", c.title, c.name)
	}
	for i := range views {
		r.section(&b, &views[i])
	}
	return b.Bytes()
}

// behind returns the table of the comparisons in which the best peer is ahead of this library, how many these are,
// and how many comparisons there are: each subject of this library in each table that has a peer.
func (r *report) behind() (list string, n, all int) {
	var b strings.Builder
	for _, t := range *r.results {
		lead := viewOf(t.work.section).lead
		other, theirs := t.best(lead, peer)
		if other == nil {
			continue
		}
		for _, row := range t.rows {
			v, _, _, ok := row.of(lead)
			if !ok || row.kind != ours && row.kind != leased {
				continue
			}
			all++
			if lead.ratio(v, theirs) < 1 {
				n++
				fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", t.work.title(), lead, row.subject, number(v), other.subject, number(theirs), times(lead.ratio(v, theirs)))
			}
		}
	}
	if n == 0 {
		return "", 0, all
	}
	return "\n| work | compared | subject | its figure | best peer | its figure | ratio |\n|---|---|---|---|---|---|---|\n" + b.String(), n, all
}

// section writes the tables of a section.
func (r *report) section(b *bytes.Buffer, v *view) {
	first := true
	for _, t := range *r.results {
		if t.work.section != v.section {
			continue
		}
		if first {
			fmt.Fprintf(b, "\n## %s\n", v.title)
			if v.note != "" {
				fmt.Fprintf(b, "\n%s\n", v.note)
			}
			first = false
		}
		fmt.Fprintf(b, "\n### %s\n\n| | %s | least–greatest | of the best peer |", t.work.title(), v.lead)
		for _, c := range v.columns {
			fmt.Fprintf(b, " %s |", c)
		}
		fmt.Fprintf(b, "\n|---|%s\n", strings.Repeat("---|", 3+len(v.columns)))
		_, theirs := t.best(v.lead, peer)
		for _, row := range t.sorted(v.lead) {
			name := row.subject
			if row.kind == ours || row.kind == leased {
				name = "**" + name + "**"
			}
			if row.failed > 0 {
				name += fmt.Sprintf(" (failed %d of %d times: %s)", row.failed, row.failed+len(row.samples), clean(row.err))
			}
			median, least, greatest, ok := row.of(v.lead)
			if !ok {
				fmt.Fprintf(b, "| %s | failed |%s\n", name, strings.Repeat(" |", 2+len(v.columns)))
				continue
			}
			ratio := ""
			if theirs != 0 {
				ratio = times(v.lead.ratio(median, theirs))
			}
			fmt.Fprintf(b, "| %s | %s | %s–%s | %s |", name, number(median), number(least), number(greatest), ratio)
			for _, c := range v.columns {
				text := ""
				if v, _, _, ok := row.of(c); ok {
					text = number(v)
				}
				fmt.Fprintf(b, " %s |", text)
			}
			b.WriteByte('\n')
		}
	}
}

// clean makes an error part of a line.
func clean(err error) string {
	text := strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "|", "/")), " ")
	if len(text) > 120 {
		text = text[:120] + "…"
	}
	return strings.ToValidUTF8(text, "")
}

// headline is a table that has a chart and a line in the documentation.
type headline struct {
	name, title string
	work        work
	metric      metric
	own         kind // ours, or leased: then the others' bars are too short to be compared
}

func (r *report) headlines() []headline {
	s := &r.machine.size
	one, few, all := "one key", number(float64(s.redis))+" keys", number(float64(s.local))+" keys"
	many, most := fmt.Sprintf(", %d goroutines", s.many()), fmt.Sprintf(", %d goroutines", s.most())
	return []headline{
		{"local-one-key", "local, " + one + many, work{"local", 1, false, s.many()}, decisions, ours},
		{"local-many-keys", "local, " + all + many, work{"local", s.local, false, s.many()}, decisions, ours},
		{"local-memory", "local, " + all, work{section: "memory", keys: s.local}, heapBytes, ours},
		{"redis-one-key", "Redis, " + one + most, r.busiest("redis", 1), decisions, ours},
		{"redis-leases", "Redis, with leases, " + one + most, r.busiest("redis", 1), decisions, leased},
		{"redis-many-keys", "Redis, " + few + most, r.busiest("redis", s.redis), decisions, ours},
		{"redis-cpu", "Redis, " + few + most, r.busiest("redis", s.redis), serverCPU, ours},
		{"cluster-many-keys", "Redis Cluster, " + few + most, r.busiest("cluster", s.redis), decisions, ours},
		{"latency", "Redis, at 70 % of each one's own peak", r.busiest("latency", s.redis), p99, ours},
	}
}

func (r *report) charts() []chart {
	var list []chart
	for _, h := range r.headlines() {
		t := r.results.table(h.work)
		if t == nil {
			continue
		}
		c := chart{name: h.name, title: fmt.Sprintf("%s: %s", h.title, h.metric)}
		for _, row := range t.sorted(h.metric) {
			if v, least, greatest, ok := row.of(h.metric); ok && (row.kind != leased || h.own == leased) {
				c.bars = append(c.bars, bar{row.subject, row.kind, v, least, greatest})
			}
		}
		list = append(list, c)
	}
	c := chart{name: "growth", title: fmt.Sprintf("%s, %d goroutines: %s", onRueidis, r.machine.size.most(), decisions)}
	for _, keys := range r.machine.size.growth {
		if v, least, greatest, ok := r.results.table(r.busiest("growth", keys)).row(onRueidis).of(decisions); ok {
			c.bars = append(c.bars, bar{number(float64(keys)) + " keys", ours, v, least, greatest})
		}
	}
	if len(c.bars) > 0 {
		list = append(list, c)
	}
	return list
}

// row returns a subject's row; a table and a row that are not there have no figures.
func (t *table) row(subject string) *row {
	if t != nil {
		for _, r := range t.rows {
			if r.subject == subject {
				return r
			}
		}
	}
	return &row{}
}

// The headlines go between these lines of a page.
const (
	figuresBegin = "<!-- figures of go -C bench run . -docs ../docs/performance.md -->\n"
	figuresEnd   = "<!-- end of figures -->\n"
)

// figures returns the text that goes between the markers.
func (r *report) figures() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n| work | compared | fleetquota | best peer | ratio |\n|---|---|---|---|---|\n")
	for _, h := range r.headlines() {
		t := r.results.table(h.work)
		own, v := t.best(h.metric, h.own)
		other, theirs := t.best(h.metric, peer)
		if own != nil && other != nil {
			fmt.Fprintf(&b, "| %s | %s | %s | %s, %s | %s |\n", h.title, h.metric, number(v), number(theirs), other.subject, times(h.metric.ratio(v, theirs)))
		}
	}
	fmt.Fprintf(&b, "\nMedians over %d counts; %s.\n", r.machine.counts, &r.machine)
	_, n, all := r.behind()
	fmt.Fprintf(&b, "\nA peer is ahead in %d of %d comparisons: [the list](../bench/RESULTS.md#where-a-peer-is-ahead).\n\n", n, all)
	return b.String()
}

// write writes all files. page is the file that has the markers, or "".
func write(dir, page string, r *report) error {
	if err := os.MkdirAll(filepath.Join(dir, "charts"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "RESULTS.md"), r.markdown(), 0o644); err != nil {
		return err
	}
	for _, c := range r.charts() {
		if err := os.WriteFile(filepath.Join(dir, "charts", c.name+".svg"), c.svg(), 0o644); err != nil {
			return err
		}
	}
	if page == "" {
		return nil
	}
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	head, rest, begins := strings.Cut(string(text), figuresBegin)
	_, tail, ends := strings.Cut(rest, figuresEnd)
	if !begins || !ends {
		return errors.New(page + " lacks the lines " + figuresBegin + "and " + figuresEnd)
	}
	return os.WriteFile(page, []byte(head+figuresBegin+r.figures()+figuresEnd+tail), 0o644)
}
