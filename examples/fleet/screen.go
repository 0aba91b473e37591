package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// screen shows a fleet at work: redrawn in place on a terminal, as plain lines elsewhere.
type screen struct {
	w      io.Writer
	fleet  *fleet
	store  string
	length time.Duration
	live   bool
}

func newScreen(w io.Writer, f *fleet, store string, length time.Duration) *screen {
	return &screen{w: w, fleet: f, store: store, length: length, live: isTerminal(w)}
}

// isTerminal reports whether w is a character device, on a terminal that understands escape sequences.
func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok || os.Getenv("TERM") == "dumb" {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// follow shows the fleet until done is closed.
func (s *screen) follow(done <-chan struct{}) {
	every := time.Second
	if s.live {
		every = 100 * time.Millisecond
		// While it is redrawn, the cursor is hidden and long lines are cut rather than wrapped.
		fmt.Fprint(s.w, "\x1b[?25l\x1b[?7l")
		defer fmt.Fprint(s.w, "\x1b[?7h\x1b[?25h")
	} else {
		fmt.Fprintln(s.w, s.title())
	}
	start := time.Now()
	tick := time.NewTicker(every)
	defer tick.Stop()
	drawn, shown := 0, start
	for {
		select {
		case <-tick.C:
			shown = time.Now()
			drawn = s.show(shown.Sub(start), drawn)
		case <-done:
			if s.live || time.Since(shown) > every/2 {
				s.show(time.Since(start), drawn)
			}
			return
		}
	}
}

func (s *screen) title() string {
	return fmt.Sprintf("%d teams of %d agents on %s, for %v", len(s.fleet.teams), len(s.fleet.agents)/len(s.fleet.teams), s.store, s.length)
}

// show prints the present state, over the given number of lines drawn before, and returns how many it drew.
func (s *screen) show(after time.Duration, drawn int) int {
	s.fleet.mu.Lock()
	defer s.fleet.mu.Unlock()
	if !s.live {
		t := s.fleet.total()
		fmt.Fprintf(s.w, "%4.1fs  offered %5d  admitted %5d  denied by", after.Seconds(), t.calls, t.admitted)
		for _, r := range rules {
			fmt.Fprintf(s.w, "  %s %4d", r.name, t.deniedBy[r.name])
		}
		fmt.Fprintln(s.w)
		return 0
	}
	var b strings.Builder
	if drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", drawn)
	}
	lines := s.frame(after)
	for _, line := range lines {
		b.WriteString("\x1b[2K" + line + "\n")
	}
	io.WriteString(s.w, b.String())
	return len(lines)
}

// frame returns the lines of the live picture. The caller holds the fleet's lock.
func (s *screen) frame(after time.Duration) []string {
	f := s.fleet
	row := func(t *stats, bar, agents string) string {
		return fmt.Sprintf("%-8s %s  %6d %8d %6d  %s", t.name, bar, t.calls, t.admitted, t.calls-t.admitted-t.failed, agents)
	}
	lines := []string{
		fmt.Sprintf("%s: %.1fs", s.title(), after.Seconds()),
		fmt.Sprintf("%-8s %-30s  %6s %8s %6s  %s", "", "tokens left", "calls", "admitted", "denied", "agents"),
		row(f.total(), f.bar(fleetTokens, f.agents[0].everyone), ""),
	}
	for i, t := range f.teams {
		perTeam := len(f.agents) / len(f.teams)
		agents := f.agents[i*perTeam : (i+1)*perTeam]
		var levels strings.Builder
		for _, a := range agents {
			levels.WriteRune(block(f.share(agentTokens, a.key)))
		}
		lines = append(lines, row(t, f.bar(teamTokens, agents[0].team), levels.String()))
	}
	return lines
}

// share returns the part of its capacity that a key had left when it was last charged, from 0 to 1.
func (f *fleet) share(r *rule, key string) float64 {
	l, known := f.left[place{r.name, key}]
	if !known {
		return 1
	}
	return max(float64(l.remaining), 0) / float64(r.capacity)
}

func (f *fleet) bar(r *rule, key string) string {
	const width = 20
	share := f.share(r, key)
	full := min(int(share*width+0.5), width)
	return fmt.Sprintf("%s%s %4d/%4d",
		strings.Repeat("█", full), strings.Repeat("░", width-full), int64(share*float64(r.capacity)+0.5), r.capacity)
}

// block returns a block character as high as the share, from 0 to 1.
func block(share float64) rune {
	blocks := []rune("▁▂▃▄▅▆▇█")
	return blocks[min(int(share*float64(len(blocks))), len(blocks)-1)]
}

// printTable prints how many calls and tokens were offered and admitted, and how many calls each limit denied.
func printTable(w io.Writer, f *fleet) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fmt.Fprintf(w, "\n%-8s %16s   %35s   %25s\n", "", "calls", "calls denied by", "tokens")
	fmt.Fprintf(w, "%-8s %7s %8s  ", "", "offered", "admitted")
	for _, r := range rules {
		fmt.Fprintf(w, " %8s", r.name)
	}
	fmt.Fprintf(w, "   %7s %8s %8s\n", "offered", "admitted", "settled")
	total := f.total()
	for _, s := range append(f.teams[:len(f.teams):len(f.teams)], total) {
		fmt.Fprintf(w, "%-8s %7d %8d  ", s.name, s.calls, s.admitted)
		for _, r := range rules {
			fmt.Fprintf(w, " %8d", s.deniedBy[r.name])
		}
		fmt.Fprintf(w, "   %7d %8d %+8d\n", s.tokens, s.tokensAdmitted, s.settled)
	}
	if f.lastErr != nil {
		fmt.Fprintf(w, "\n%d calls failed. The last error: %v\n", total.failed, f.lastErr)
	}
}
