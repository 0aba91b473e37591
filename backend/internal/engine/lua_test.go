package engine

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/yuin/gopher-lua/ast"
	"github.com/yuin/gopher-lua/parse"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The Lua of miniredis assigns to a local variable before it evaluates the expressions after it: in
// "a, b = 0, a" b becomes 0. An assignment of several values must not read a variable that it has just assigned.
func TestAssignments(t *testing.T) {
	s := newScripts(false)
	texts := map[string]string{"load": s.load.text.(string), "swap": s.swap.text.(string), "probe": probeScript()}
	for name, rule := range rules() {
		kernel := rule.(driver.Scripted).Lua()
		single, err := s.one(rule.Spec().Rule, rule.Spec().Reads, kernel)
		if err != nil {
			t.Fatal(err)
		}
		texts[name] = single.text.(string)
		texts["batch of "+name] = s.batch([]quota.Rule{rule.Spec().Rule}).text.(string)
	}
	for name, text := range texts {
		for _, fault := range assignments(t, text) {
			t.Errorf("%s: got %s, want an assignment of each by itself", name, fault)
		}
	}
	for text, want := range map[string]int{
		"local a, b = 1, 2 a, b = b, a":                                          1,
		"local a, b = 1, 2 a, b = 0, a + 1":                                      1,
		"local a, b = 1, 2 a, b = b + 1, 0":                                      0,
		"local a, b = 1, 2 a, b = f(a, b)":                                       0,
		"local a, b, c = 1, 2, 3 a, b, c = b, 0, -b":                             1,
		"local a, b = {}, 2 if b then for i = 1, 2 do a[1], b = b, a[1] end end": 0,
		"local function f(a, b) b, a = 0, {x = {b}} end":                         1,
	} {
		if got := assignments(t, text); len(got) != want {
			t.Errorf("faults of %q: got %q, want %d", text, got, want)
		}
	}
}

// assignments returns the assignments of a text that read a variable which they have assigned before.
func assignments(t *testing.T, text string) (faults []string) {
	t.Helper()
	chunk, err := parse.Parse(strings.NewReader(text), "text")
	if err != nil {
		t.Fatal(err)
	}
	walk(reflect.ValueOf(chunk), func(node any) {
		s, ok := node.(*ast.AssignStmt)
		if !ok {
			return
		}
		set := map[string]bool{}
		for i, right := range s.Rhs {
			walk(reflect.ValueOf(right), func(node any) {
				if v, ok := node.(*ast.IdentExpr); ok && set[v.Value] {
					faults = append(faults, fmt.Sprintf("%s of line %d read after it was assigned", v.Value, s.Line()))
				}
			})
			if v, ok := s.Lhs[min(i, len(s.Lhs)-1)].(*ast.IdentExpr); ok {
				set[v.Value] = true
			}
		}
	})
	return faults
}

// walk visits a part of a text, and all parts inside it.
func walk(v reflect.Value, visit func(node any)) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			visit(v.Interface())
			walk(v.Elem(), visit)
		}
	case reflect.Interface:
		walk(v.Elem(), visit)
	case reflect.Slice:
		for i := range v.Len() {
			walk(v.Index(i), visit)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				walk(v.Field(i), visit)
			}
		}
	}
}
