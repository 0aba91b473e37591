package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
)

// chart is a picture of bars, one below the other.
type chart struct {
	name, title string
	bars        []bar
}

// bar is a median, with the least and the greatest of its samples.
type bar struct {
	label                  string
	kind                   kind
	value, least, greatest float64
}

const (
	chartWidth = 760
	labelWidth = 280
	valueWidth = 80
	barHeight  = 24
	titleSpace = 44
)

// style has the colours of both themes, which the reader's browser chooses from.
const style = `
.back { fill: #ffffff } text { font: 13px sans-serif; fill: #1f2328 } .title { font-weight: bold } .spread { stroke: #1f2328 }
.ours { fill: #0969da } .leased { fill: #54aeff } .peer { fill: #8c959f } .floor { fill: #d0d7de }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117 } text { fill: #e6edf3 } .spread { stroke: #e6edf3 }
.ours { fill: #2f81f7 } .leased { fill: #79c0ff } .peer { fill: #6e7681 } .floor { fill: #30363d }
}
`

func (k kind) String() string { return [...]string{"peer", "ours", "leased", "floor"}[k] }

func (c chart) svg() []byte {
	var b bytes.Buffer
	height := titleSpace + barHeight*len(c.bars) + barHeight/2
	longest := 0.0
	for _, bar := range c.bars {
		longest = max(longest, bar.greatest)
	}
	x := func(v float64) float64 {
		if longest == 0 {
			return labelWidth
		}
		return labelWidth + v/longest*(chartWidth-labelWidth-valueWidth)
	}
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %[1]d %[2]d\" role=\"img\">\n", chartWidth, height)
	fmt.Fprintf(&b, "<title>%s</title>\n<style>%s</style>\n", escape(c.title), style)
	fmt.Fprintf(&b, "<rect class=\"back\" width=\"%d\" height=\"%d\"/>\n", chartWidth, height)
	fmt.Fprintf(&b, "<text class=\"title\" x=\"12\" y=\"26\">%s</text>\n", escape(c.title))
	for i, bar := range c.bars {
		y := titleSpace + barHeight*i
		middle := float64(y) + barHeight/2
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n", labelWidth-8, y+17, escape(bar.label))
		fmt.Fprintf(&b, "<rect class=\"%s\" x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\"/>\n", bar.kind, labelWidth, y+3, max(1, x(bar.value)-labelWidth), barHeight-6)
		fmt.Fprintf(&b, "<line class=\"spread\" x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\"/>\n", x(bar.least), middle, x(bar.greatest), middle)
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%d\">%s</text>\n", x(bar.greatest)+6, y+17, number(bar.value))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func escape(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}
