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
	{"ids", "Request ids", "Both subjects of a pair make an id for each charge, and one sends it.",
		decisions, []metric{p50, p99, p999, allocs, serverCPU}},
	{"redis", "Redis, one server", "Client and server share the processors.",
		decisions, []metric{p50, p99, p999, allocs, serverCPU}},
	{"callers", "Redis, few callers", "A decision is as long as its round trip. On one processor, client and server wait for each other; with a processor each, every message wakes the other side. The client has one processor in both. Through Standard: with the timeout, bulkhead, breaker and fallback of FromEnv.",
		decisions, []metric{p50, p99, p999, allocs, serverCPU}},
	{"job", "Main job, Redis", jobNote,
		decisions, []metric{p50, p99, allocs, serverCPU}},
	{"cluster job", "Main job, Redis Cluster", "The same on three masters, which share the processors. fleetquota decides three groups in parts.",
		decisions, []metric{p50, p99, allocs, serverCPU}},
	{"redis memory", "Redis, memory", "used_memory has the server's tables in it, MEMORY USAGE has not.",
		usedBytes, []metric{keyBytes}},
	{"benchmark", "redis-benchmark", "50 connections, 16 commands on end on each.",
		decisions, []metric{serverCPU}},
	{"cluster", "Redis Cluster, three masters", "They share the processors too: this shows the cost of a cluster, and not its gain.",
		decisions, []metric{p50, p99, p999, allocs, serverCPU}},
	{"latency", "Latency at fixed rates", "Decisions are offered at a steady rate, answered or not, and latencies count from when a decision was due, so that none is left out because the one before was late. The rate is kept to within about 0.1 ms, which is part of all latencies, the floors' too. A subject that is 100 ms behind at the end did not keep the rate, and has no latencies.",
		p99, []metric{p50, p999, decisions}},
	{"growth", "Growth", "",
		decisions, []metric{serverCPU, usedBytes, keyBytes}},
	{"postgres", "PostgreSQL", "Client and server share the processors, and a commit waits for the disk unless synchronous_commit is off. UPDATE … WHERE counts and gives nothing back. A pool has 16 connections.",
		decisions, []metric{p50, p99, p999, allocs}},
}

const jobNote = "A decision here is a whole job: an estimate is taken of an agent's quota, its team's and its fleet's, and when the actual cost is known all three are settled. " +
	"fleetquota takes and settles lists, all charges or none, through Standard and Fallback as FromEnv makes them, and with request ids where the keys are of one group. " +
	"The peers have neither lists nor ids nor settles: they make three calls, and three that give back, **which is not atomic**: a program that ends between two of them has charged a part. " +
	"Their calls come in sequence, or at once, for the client to put them into one pipeline."

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
	if w.how != "" {
		parts = append(parts, w.how)
	}
	if w.denied {
		parts = append(parts, "denied")
	}
	if w.goroutines == 1 {
		parts = append(parts, "1 goroutine")
	} else if w.goroutines > 1 {
		parts = append(parts, fmt.Sprint(w.goroutines, " goroutines"))
	}
	if w.on != anywhere {
		parts = append(parts, string(w.on))
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
	fmt.Fprintf(&b, "# Results\n\nWritten by `go -C bench run .`, which does it again. Medians over %d counts, or, against Redis and with request ids, over %d short turns.\n\n", m.counts, m.counts*turnsOfCount)
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
		columns := []string{string(v.lead), "least–greatest", "of the best peer"}
		paired := slices.ContainsFunc(t.rows, func(row *row) bool { return t.pair(row) != nil })
		if paired {
			columns = append(columns, "of its pair, count by count")
		}
		for _, c := range v.columns {
			columns = append(columns, string(c))
		}
		fmt.Fprintf(b, "\n### %s\n\n| | %s |\n|---|%s\n", t.work.title(), strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
		_, theirs := t.best(v.lead, peer)
		for _, row := range t.sorted(v.lead) {
			name := row.subject
			if row.kind == ours || row.kind == leased {
				name = "**" + name + "**"
			}
			if row.failed > 0 {
				name += fmt.Sprintf(" (failed %d of %d times: %s)", row.failed, len(row.samples), clean(row.err))
			}
			if n := row.behind(); n > 0 {
				name += fmt.Sprintf(" (did not keep the rate %d of %d times)", n, len(row.samples))
			}
			median, least, greatest, ok := row.of(v.lead)
			cells := []string{number(median), number(least) + "–" + number(greatest), ""}
			switch {
			case !ok && row.failed == len(row.samples):
				cells = []string{"failed", "", ""}
			case !ok:
				cells = []string{"too slow", "", ""}
			case theirs != 0:
				cells[2] = times(v.lead.ratio(median, theirs))
			}
			if paired {
				text := ""
				if other := t.pair(row); other != nil {
					if ratio, ok := row.beside(other, v.lead); ok {
						text = times(ratio) + " of " + other.subject
					}
				}
				cells = append(cells, text)
			}
			for _, c := range v.columns {
				text := ""
				if v, _, _, ok := row.of(c); ok {
					text = number(v)
				}
				cells = append(cells, text)
			}
			fmt.Fprintf(b, "| %s | %s |\n", name, strings.Join(cells, " | "))
		}
	}
}

// pair returns the row that a row is compared with count by count, or nil.
func (t *table) pair(r *row) *row {
	i := slices.IndexFunc(t.rows, func(o *row) bool { return o.subject == pairs[r.subject] })
	if i < 0 {
		return nil
	}
	return t.rows[i]
}

// behind returns how often a subject did not keep the rate that was offered.
func (r *row) behind() (n int) {
	for _, s := range r.samples {
		_, open := s[offered]
		if _, kept := s[p99]; open && !kept {
			n++
		}
	}
	return n
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
	list := []headline{
		{"local-one-key", "local, " + one + many, work{section: "local", keys: 1, goroutines: s.many()}, decisions, ours},
		{"local-many-keys", "local, " + all + many, work{section: "local", keys: s.local, goroutines: s.many()}, decisions, ours},
		{"local-memory", "local, " + all, work{section: "memory", keys: s.local}, heapBytes, ours},
		{"redis-one-key", "Redis, " + one + most, r.busiest("redis", 1), decisions, ours},
		{"redis-leases", "Redis, with leases, " + one + most, r.busiest("redis", 1), decisions, leased},
		{"redis-many-keys", "Redis, " + few + most, r.busiest("redis", s.redis), decisions, ours},
		{"redis-cpu", "Redis, " + few + most, r.busiest("redis", s.redis), serverCPU, ours},
		{"redis-caller-one", "Redis, " + few + ", 1 goroutine, " + string(onOne), work{section: "callers", keys: s.redis, goroutines: 1, on: onOne}, decisions, ours},
		{"redis-caller-two", "Redis, " + few + ", 1 goroutine, " + string(onTwo), work{section: "callers", keys: s.redis, goroutines: 1, on: onTwo}, decisions, ours},
		{"job", "main job, Redis, " + groupings[0].name + most, r.jobWork("job"), decisions, ours},
		{"cluster-job", "main job, Redis Cluster, " + groupings[0].name + most, r.jobWork("cluster job"), decisions, ours},
		{"cluster-many-keys", "Redis Cluster, " + few + most, r.busiest("cluster", s.redis), decisions, ours},
	}
	for _, rate := range s.rates {
		w := latencyWork(s, rate)
		list = append(list, headline{fmt.Sprint("latency-", rate), "Redis, " + few + ", " + w.how, w, p99, ours})
	}
	return list
}

// jobWork is the main job in one group, by the most goroutines.
func (r *report) jobWork(section string) work {
	s := &r.machine.size
	return work{section: section, keys: s.job, goroutines: s.most(), how: groupings[0].name}
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
		if len(c.bars) > 0 {
			list = append(list, c)
		}
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
	old, err := filepath.Glob(filepath.Join(dir, "charts", "*.svg"))
	if err != nil {
		return err
	}
	for _, path := range old { // of a run that had others
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "RESULTS.md"), r.markdown(), 0o644); err != nil {
		return err
	}
	for _, c := range r.charts() {
		picture, err := c.svg()
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "charts", c.name+".svg"), picture, 0o644); err != nil {
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
